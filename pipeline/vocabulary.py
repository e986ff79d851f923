"""How many ids a policy knows, from wherever it can be read without loading anything."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.manifest import MANIFEST, read_json
from pipeline.repos import Repo


def vocabulary_of(tokenizer: str, source: Repo) -> int:
    """Return the size of the vocabulary of a model's folder; 0 where nothing here tells it.

    The folder is `tokenizer` or, without one, the policy that played the rollouts: the manifests of
    the input and of what it was made from name it.
    """
    names = [tokenizer] if tokenizer else _policies(source.manifest)
    return next(filter(None, map(_size, names)), 0)


def _policies(manifest: Mapping[str, Any] | None) -> Iterator[str]:
    for _ in range(8):  # rollouts, ranked, ranked again: lineages are short
        if manifest is None:
            return
        if manifest["stage"] == "generate":
            yield from (m["name"] for r, m in manifest["models"].items() if r == "model")
        parents = [Path(entry["name"]).expanduser() for entry in manifest["inputs"]]
        manifest = read_json(parents[0] / MANIFEST) if parents else None


def _size(name: str) -> int:
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return 0
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # Models that see and hear keep it one level down.
        return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is no model's configuration: {error}") from error
