"""Look at single rows of a repo, however large: one row group is read, and no shard is hashed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.manifest import MANIFEST, read_json
from pipeline.repos import Repo, open_repo

SAMPLES = ("sample", "chosen_sample", "reject_sample")
ANCESTORS = 4
"""Generations of parents whose manifests are asked for a tokenizer: an iteration's stages."""


@dataclass(frozen=True)
class Glance:
    """One split of a repo; `counts` are the rows of its shards."""

    repo: Repo
    split: str
    counts: Sequence[int]

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def place(self, row: int) -> int:
        """Return a row's place, counted from 0; a negative number counts from the end."""
        if not -self.num_rows <= row < self.num_rows:
            raise DataError(
                f"{self.repo.name} has no row {row} in its split {self.split}: --row goes from 0 "
                f"to {self.num_rows - 1}, or from -1 back to {-self.num_rows}"
            )
        return row % self.num_rows

    def row(self, place: int) -> dict[str, Any]:
        """Read one row. DataError where its file is damaged, or its text is none."""
        import pyarrow.parquet as pq

        for path, count in zip(self.repo.files[self.split], self.counts, strict=True):
            if place < count:
                try:
                    with pq.ParquetFile(path) as file:
                        return _row_of(file, place)
                except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
                    raise DataError(
                        f"row {place} of {path} can't be read ({error}); download or make it again"
                    ) from error
            place -= count
        raise AssertionError("a place is within the split")

    def places_of(self, prompt_id: str, sample: int | None) -> list[int]:
        """Return where a prompt's rows are, or those of one of its samples. DataError for none."""
        self.repo.require(["prompt_id"])
        keys = [name for name in SAMPLES if name in self.repo.columns(self.split)]
        found, start = list[int](), 0
        for batch in self.repo.batches(self.split, ["prompt_id", *keys], 65536):
            hit = pc.equal(batch.column("prompt_id"), prompt_id)
            if sample is not None:
                hit = pc.and_(hit, _any_of(batch, keys, sample))
            found += (start + pc.indices_nonzero(hit).to_numpy()).tolist()
            start += batch.num_rows
        if not found:
            which = "" if sample is None else f", sample {sample}"
            raise DataError(f"{self.repo.name} has no row of prompt {prompt_id}{which}")
        return found


def _any_of(batch: pa.RecordBatch, keys: Sequence[str], sample: int) -> pa.Array:
    found = pa.repeat(pa.scalar(False), batch.num_rows)
    for key in keys:
        found = pc.or_(found, pc.equal(batch.column(key), sample))
    return found


def _row_of(file: Any, place: int) -> dict[str, Any]:
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if place < rows:
            return file.read_row_group(group).slice(place, 1).to_pylist()[0]
        place -= rows
    raise AssertionError("a place is within the file")


def glance(text: str, split: str = "") -> Glance:
    """Open a split of a repo (the first one unless told); only the footers of its files are read.

    DataError where there is none.
    """
    import pyarrow.parquet as pq

    repo = open_repo(text, verified=False)
    chosen = split or repo.splits()[0]
    if chosen not in repo.files:
        raise DataError(f"{text} has no split {chosen!r}; it has: {', '.join(repo.splits())}")
    return Glance(repo, chosen, [pq.read_metadata(path).num_rows for path in repo.files[chosen]])


def tokenizer_names(repo: Repo) -> list[str]:
    """Name the models whose ids these may be: what the manifest says, then what its parents say."""
    return list(dict.fromkeys(_named(repo.manifest, repo.path, ANCESTORS)))


def _named(manifest: Mapping[str, Any] | None, folder: Path, depth: int) -> Iterator[str]:
    if manifest is None or not depth:
        return
    config = manifest.get("config", {})
    for field in ("tokenizer", "base_model", "model"):
        if isinstance(config.get(field), str) and config[field]:
            found = next(_places(config[field], folder, "tokenizer.json"), None)
            yield config[field] if found is None else str(found)
    for parent in manifest.get("inputs", []):
        if place := next(_places(parent["name"], folder, MANIFEST), None):
            yield from _named(read_json(place / MANIFEST), place, depth - 1)


def _places(name: str, folder: Path, file: str) -> Iterator[Path]:
    """Find a folder that a manifest names: as typed, seen from here, or beside the repo."""
    typed = Path(name).expanduser()
    yield from (place for place in (typed, folder.parent / typed.name) if (place / file).is_file())
