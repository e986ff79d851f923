"""Time our tokenizing against the seed's way, and against the tokenizer alone.

python bench/tokenize.py

REFUEL's pairs of five-turn dialogues, 3,000 of them, of about 1,000 ids each by a byte-level BPE of
32,000 ids that is trained here: from sampled ids, from text, and as the seed's tokenize_mask.py
does it, in one process; reading and writing count, imports don't. Then what a row takes on disk,
and what memory 200,000 rollouts take. Fails where ours and the seed's rows differ for no reason.
The last line is JSON.
"""

import sys


def hand_over() -> None:
    """Put the standard library's `tokenize` in the place of this file.

    `python bench/X.py` puts bench/ first on the import path, so that linecache, inspect and all
    that need those find this file by the name of theirs; import takes what is in sys.modules then.
    """
    import importlib.machinery
    import importlib.util
    import os

    here = os.path.dirname(os.path.abspath(__file__))
    path = [place for place in sys.path if os.path.abspath(place) != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)


if __name__ == "tokenize":
    hand_over()
elif __name__ == "__main__":
    import os

    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import tyro
    from _tokenize_measure import Config, main

    main(tyro.cli(Config))
