"""What a column of log-probs depends on, where it is kept, and which columns a place holds."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.errors import DataError
from pipeline.repos import RepoName, parse_repo
from pipeline.sources import Source

MODELS = {"old_logprob": "base_model", "ref_logprob": "ref_model"}
"""The columns, and the flag that names the model of each."""
MASKS = {
    "mask": "The masks are those of the parent repo.",
    "all": "The masks are not the parent's: every policy turn up to the score turn trains.",
    "forked": "The masks are not the parent's: the policy turn at which a pair parts trains.",
}
NAMES = {"old_logprob": "old log-probs", "ref_logprob": "reference log-probs"}


@dataclass(frozen=True)
class Key:
    """What a column of log-probs depends on, besides the rows: a fingerprint, hashes, settings.

    `turns`: which policy turns train, see turns.TURNS.
    """

    model: str
    tokenizer: str
    template: str
    temperature: float
    dtype: str
    attn_implementation: str
    turns: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """The keys of a repo's columns, as JSON values: what its manifest calls the config."""

    columns: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the log-probs of a source are kept."""

    name: RepoName
    source: Source

    @property
    def folder(self) -> Path:
        """The folder of the repo, on this machine even where its name is a Hub id."""
        return self.name.folder


@dataclass(frozen=True)
class Wanted:
    """A column of log-probs that somebody needs: which one, its key, and its model's name."""

    column: str
    key: Key
    model: str


def key_of(tokenizer: Any, model: str, turns: str, temperature: float, config: Any) -> Key:
    """Return the key of log-probs made here and now; `model` is its fingerprint.

    `config` is a LoadConfig, for the dtype and the attention.
    """
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    encoder, template = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)
    return Key(
        model,
        encoder,
        template,
        temperature,
        config.precision,
        config.attn_implementation,
        turns,
        versions,
    )


def cluster_repo(query_dataset: str, cluster: str) -> str:
    """Name the repo of a cluster tag; a revision of the pairs is part of its key, not its name."""
    text = query_dataset.rstrip("/").split("@")[0]
    return f"{text}_{cluster}"


def cluster_place(source: Source, cluster: str) -> Place:
    """Return the place of a cluster tag."""
    return Place(parse_repo(cluster_repo(source.repo.name, cluster)), source)


def scratch_place(source: Source, work: Path) -> Place:
    """Return a place in a stage's work folder: without a cluster tag log-probs aren't kept."""
    folder = (work / "logprobs").absolute()
    return Place(RepoName(str(folder), None, folder, None), source)


def held_keys(place: Place) -> tuple[dict[str, Any], str | None]:
    """Return the keys of the columns that a place holds for these rows, or why it holds none.

    Raises DataError if what is there is no repo of log-probs.
    """
    held = manifest.read_json(place.folder / manifest.MANIFEST)
    if held is None:
        if place.folder.exists() and any(place.folder.iterdir()):
            raise DataError(f"{place.folder} holds something else; choose another cluster tag")
        return {}, None
    if held.get("kind") != "logprobs":
        raise DataError(
            f"{place.folder} is a repo of kind {held.get('kind')!r}, no cache of log-probs: "
            "choose another cluster tag"
        )
    identity = held["identity"]
    if differing := manifest.differences(
        {"inputs": identity["inputs"]}, {"inputs": [place.source.repo.content_hash]}
    ):
        return {}, "; ".join(differing)
    keys = identity["config"].get("columns", {})
    turns = {key["turns"] for key in keys.values()} - {place.source.turns}
    if turns:
        return {}, f"other turns that train: {', '.join(turns)} -> {place.source.turns}"
    return keys, None


def differs(held: Mapping[str, Any], key: Key) -> str | None:
    """Say what of a column's key differs, or None."""
    return "; ".join(manifest.differences(held, dataclasses.asdict(key))) or None
