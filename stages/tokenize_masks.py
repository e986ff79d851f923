"""Turn ranked rollouts into ids, masks and pairs (or groups), dropping rows with a reason.

python stages/tokenize_masks.py --input_repo ./ranked --output_repo ./pairs
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.records import Rollout
    from pipeline.selection import Rules

FORMATS = ("pairs", "groups")
MASKS = ("forked", "last", "all")
ADVANTAGES = ("none", "normalised", "centred")
TRUNCATED = ("keep", "drop")
BATCH_ROWS = 256
ROLLOUT_KEYS = ("prompt_id", "messages", "turns")


@dataclass(frozen=True)
class Config:
    """Turn ranked rollouts into a pairs repo (REFUEL, DPO) or a groups repo (SFT, GRPO)."""

    input_repo: str = execution("")
    """Ranked rollouts (for SFT generate's will do), or pairs that others published, ids or text."""
    output_repo: str = execution("")
    """Where to write: ./folder, or org/name on the Hub."""
    split: str = "train"
    """Split of the input repo."""
    max_length: int = 2048
    """Most ids of one trained sequence; a longer one is dropped, never cut."""
    format: str = "pairs"
    """pairs: the best rollout of a prompt against its worst; groups: a row for each rollout."""
    mask: str = "forked"
    """Which policy turns train: forked (where a prompt's rollouts part), last (scored) or all."""
    advantages: str = "none"
    """Of groups: none (SFT), normalised by mean and standard deviation, or centred by the mean."""
    truncated: str = "keep"
    """Whether to keep or drop rollouts with a trained turn that was cut by the length limit."""
    test_size: float = 0.05
    """Prompts of the test split: a fraction below 1, or a number of prompts; 0 makes none."""
    seed: int = 0
    """Decides which prompts are the test split."""
    tokenizer: str = ""
    """Model folder or Hub id whose chat template encodes rows that have text but no ids."""
    public: bool = execution(False)
    """Make a Hub repo public; it is private otherwise."""
    trust_remote_code: bool = False
    """Run code that a tokenizer's repo brings along."""

    def __post_init__(self) -> None:
        problems = [f"--{n} is missing" for n in ("input_repo", "output_repo") if not _of(self, n)]
        for name, known in [
            ("format", FORMATS),
            ("mask", MASKS),
            ("advantages", ADVANTAGES),
            ("truncated", TRUNCATED),
        ]:
            if _of(self, name) not in known:
                problems.append(f"--{name} {_of(self, name)}: known are {', '.join(known)}")
        if self.max_length < 2:
            problems.append(f"--max_length {self.max_length}: at least 2")
        if self.test_size < 0 or (self.test_size > 1 and self.test_size % 1):
            problems.append(f"--test_size {self.test_size}: a fraction, or a number of prompts")
        if self.format == "pairs" and self.advantages != "none":
            problems.append("--advantages are of --format groups; a pair keeps its two rewards")
        if problems:
            raise DataError("; ".join(problems))


def _of(config: Config, name: str) -> Any:
    return getattr(config, name)


def main(config: Config) -> None:
    """Select and tokenize prompt by prompt, check each row, split by prompt, write."""
    from pipeline.records import GROUPS, PAIRS

    source = store.open_repo(config.input_repo)
    models = {"tokenizer": config.tokenizer} if config.tokenizer else {}
    output = store.begin(
        "tokenize_masks",
        config.format,
        config,
        config.output_repo,
        inputs=[source],
        models={name: store.fingerprint_model(model) for name, model in models.items()},
        seed=config.seed,
        public=config.public,
    )
    if output.finished:
        return
    schema = PAIRS if config.format == "pairs" else GROUPS
    spool, dropped = output.work / "selected.arrow", list[dict[str, Any]]()
    rows = _select(config, source, output.date, dropped)
    kept = _spool(rows, schema, spool)
    test = _test_prompts(kept, config)
    splits = {"train": _read(spool, test, False), "test": _read(spool, test, True)}
    counts = {"rows_in": source.num_rows(config.split), "prompts": len(kept)}
    written = output.write(splits, dropped=dropped, counts=counts)
    _report(written, config.format, counts["rows_in"])


def _select(
    config: Config, source: store.Repo, date: str, dropped: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield checked rows in key order; those left out are appended to `dropped`."""
    from tqdm import tqdm

    from pipeline.examples import check_group, check_pair
    from pipeline.records import PairExample
    from pipeline.rows import group_row, pair_row
    from pipeline.selection import Rules

    rules = Rules(
        config.mask,
        config.max_length,
        cache(lambda: _encoder(config, date)),
        config.advantages,
        config.truncated == "drop",
    )
    vocabulary = _vocabulary(config)
    with tqdm(total=source.num_rows(config.split), unit="row") as bar:
        for rows, examples, left_out in _examples(config, source, rules):
            dropped += left_out
            for example in examples:
                if isinstance(example, PairExample):
                    check_pair(example, vocabulary)
                    yield pair_row(example)
                else:
                    check_group(example, vocabulary)
                    yield group_row(example)
            bar.update(rows)


def _examples(
    config: Config, source: store.Repo, rules: "Rules"
) -> Iterator[tuple[int, Sequence[Any], list[dict[str, Any]]]]:
    """Yield (rows read, examples, rows left out) of our rollouts or of pairs that others made."""
    from pipeline import published
    from pipeline.selection import select_group, select_pairs

    select = select_pairs if config.format == "pairs" else select_group
    columns = set(source.columns(config.split))
    if columns.issuperset(published.REFUEL_COLUMNS) and "chosen_segments" not in columns:
        if config.format != "pairs":
            raise DataError(f"{source.name} holds pairs of ids: --format pairs")
        for pairs, left_out in published.published_pairs(_rows(source, config), config.max_length):
            yield 1, pairs, left_out
    elif columns.issuperset(published.TEXT_COLUMNS) and "messages" not in columns:
        for rollouts, left_out in published.text_rollouts(_rows(source, config)):
            examples, more = select(rollouts, rules) if rollouts else ([], [])
            yield 1, examples, left_out + more
    else:
        needs_reward = config.format == "pairs" or config.advantages != "none"
        source.require([*ROLLOUT_KEYS, "rewards"] if needs_reward else ROLLOUT_KEYS)
        for rollouts in _prompts(source, config.split):
            yield len(rollouts), *select(rollouts, rules)


def _rows(source: store.Repo, config: Config) -> Iterator[dict[str, Any]]:
    for batch in source.batches(config.split, batch_rows=64):
        yield from batch.to_pylist()


def _encoder(config: Config, date: str) -> Any:
    from pipeline.chat_files import load_chat

    if not config.tokenizer:
        raise DataError(
            f"{config.input_repo} has rows of text without ids; say whose chat template encodes "
            "them with --tokenizer MODEL"
        )
    return load_chat(config.tokenizer, date, config.trust_remote_code)


def _vocabulary(config: Config) -> int:
    """Return the vocabulary's size where a model folder tells it; 0 is unknown."""
    path = Path(config.tokenizer) / "config.json"
    if not config.tokenizer or not path.is_file():
        return 0
    return json.loads(path.read_text()).get("vocab_size") or 0


def _prompts(source: store.Repo, split: str) -> Iterator[list["Rollout"]]:
    """Yield the rollouts of each prompt. Raises DataError for a key that occurs twice."""
    for prompt_id, rollouts in groupby(_rollouts(source, split), lambda row: row.prompt_id):
        group = list(rollouts)
        if len({rollout.sample for rollout in group}) < len(group):
            raise DataError(f"{source.name}: prompt {prompt_id} has two rollouts of one sample")
        yield group


def _rollouts(source: store.Repo, split: str) -> Iterator["Rollout"]:
    """Stream rollouts in key order; a foreign repo in another order is read whole and sorted."""
    import pyarrow.compute as pc

    from pipeline.rows import rollout_from_row

    names = source.table(split, ["prompt_id"]).column("prompt_id")
    places = pc.run_end_encode(names.combine_chunks())
    if len(places.values) == len(names.unique()):
        yield from store.read_rollouts(source, split)
        return
    table = source.table(split).sort_by([("prompt_id", "ascending"), ("sample", "ascending")])
    for batch in table.to_batches(64):
        yield from map(rollout_from_row, batch.to_pylist())


def _spool(rows: Iterable[dict[str, Any]], schema: "pa.Schema", path: Path) -> set[str]:
    """Write selected rows to scratch, since the split needs all prompts; return the prompts."""
    import pyarrow as pa

    prompts, pending = set[str](), list[dict[str, Any]]()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:

        def flush() -> None:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, schema=schema))
            pending.clear()

        for row in rows:
            prompts.add(row["prompt_id"])
            pending.append(row)
            if len(pending) == BATCH_ROWS:
                flush()
        if pending:
            flush()
    return prompts


def _test_prompts(prompts: set[str], config: Config) -> set[str]:
    """Draw the prompts of the test split: each by its own hash, so that at least one trains."""
    from pipeline.seeds import seed_for

    size = config.test_size
    wanted = int(size) if size >= 1 else round(size * len(prompts))
    order = sorted(
        prompts, key=lambda prompt: (seed_for(config.seed, prompt, 0, 0, "test"), prompt)
    )
    return set(order[: max(min(wanted, len(prompts) - 1), 0)])


def _read(path: Path, test: set[str], in_test: bool) -> Iterator["pa.RecordBatch"]:
    """Stream the spooled rows of one split."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            names = batch.column("prompt_id").to_pylist()
            yield batch.filter(pa.array([(name in test) == in_test for name in names]))


def _report(written: store.Repo, kind: str, rows_in: int) -> None:
    """Print what was read, kept and dropped."""
    assert written.manifest is not None
    splits: Mapping[str, int] = written.manifest["splits"]
    lines = [("rows read", rows_in)]
    lines += [(f"{kind} in {split}", rows) for split, rows in splits.items()]
    lines += [(f"dropped: {name}", rows) for name, rows in written.manifest["dropped"].items()]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {rows:>8}" for name, rows in lines))


if __name__ == "__main__":
    run(main, Config)
