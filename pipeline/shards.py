"""Parquet shards whose bytes depend on the rows alone, written and read in bounded memory."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.manifest import describe_file, sync_file, sync_folder

Rows: TypeAlias = pa.Table | Iterable[pa.RecordBatch]

ROWS_PER_GROUP = 512
GROUPS_PER_SHARD = 16
_SPLIT = re.compile(r"[A-Za-z_]\w*")


def write_shards(splits: Mapping[str, Rows], folder: Path, work: Path) -> list[dict[str, Any]]:
    """Write `folder/data/<split>-0000i-of-0000n.parquet`; return the manifest's entries.

    Shards are written to `work` and moved when their number is known. A split without rows is left
    out, because a parquet file without rows makes a repo unloadable.
    """
    entries: list[dict[str, Any]] = []
    data = folder / "data"
    for split, rows in splits.items():
        if not _SPLIT.fullmatch(split):
            raise DataError(f"a split can't be named {split!r}; use letters, digits and _")
        written = list(_write_split(rows, work / f"shards-{split}"))
        for index, (path, num_rows) in enumerate(written):
            data.mkdir(parents=True, exist_ok=True)
            final = data / f"{split}-{index:05d}-of-{len(written):05d}.parquet"
            os.replace(path, final)
            entries.append({**describe_file(folder, final), "split": split, "rows": num_rows})
    _remove_others(data, {folder / entry["path"] for entry in entries})
    return entries


def _write_split(rows: Rows, folder: Path) -> Iterator[tuple[Path, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    groups = _row_groups(rows)
    for index, first in enumerate(groups):
        path = folder / f"{index:05d}.parquet"
        yield path, _write_shard(path, first, islice(groups, GROUPS_PER_SHARD - 1))


def _write_shard(path: Path, first: pa.Table, others: Iterable[pa.Table]) -> int:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, first.schema, **_encodings(first.schema)) as writer:
        writer.write_table(first, row_group_size=ROWS_PER_GROUP)
        num_rows = first.num_rows
        for group in others:
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
            num_rows += group.num_rows
    sync_file(path)
    return num_rows


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Return how columns are encoded, by what was measured on rollouts and pairs of 1,000 ids.

    Without dictionaries ids take a tenth less and half the time: few recur within a page, and zstd
    finds those. The bytes of floats compress side by side (a third less for log-probs). Both are
    readable wherever parquet is; BYTE_STREAM_SPLIT of integers is not, and saves 3% only.
    """
    split = {
        path: "BYTE_STREAM_SPLIT" for path, kind in _leaves(schema) if pa.types.is_float32(kind)
    }
    return {"compression": "zstd", "use_dictionary": False, "column_encoding": split or None}


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Yield each column of the parquet file, as it is named there, and its type."""
    stack = [(field.name, field.type) for field in schema]
    while stack:
        path, kind = stack.pop()
        if pa.types.is_struct(kind):
            stack += [(f"{path}.{field.name}", field.type) for field in kind]
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            stack.append((f"{path}.list.element", kind.value_type))
        else:
            yield path, kind


def _row_groups(rows: Rows) -> Iterator[pa.Table]:
    """Cut batches of any size into tables of ROWS_PER_GROUP rows, each in one chunk.

    The caller's batches must not show in the bytes: resumed runs cut them elsewhere.
    """
    pending: list[pa.RecordBatch] = []
    missing = ROWS_PER_GROUP
    for batch in rows.to_batches() if isinstance(rows, pa.Table) else rows:
        while batch.num_rows:
            taken = batch.slice(0, missing)
            pending.append(taken)
            missing -= taken.num_rows
            batch = batch.slice(taken.num_rows)
            if not missing:
                yield pa.Table.from_batches(pending).combine_chunks()
                pending, missing = [], ROWS_PER_GROUP
    if pending:
        yield pa.Table.from_batches(pending).combine_chunks()


def _remove_others(data: Path, kept: set[Path]) -> None:
    # Shards of a run that was killed between its shards and its manifest.
    if data.is_dir():
        for path in set(data.iterdir()) - kept:
            path.unlink()
        sync_folder(data)


def read_batches(
    paths: Sequence[Path], columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Stream record batches from shards, one row group in memory at a time."""
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(
                batch_size=batch_rows, columns=None if columns is None else list(columns)
            )


def read_table(paths: Sequence[Path], columns: Sequence[str] | None) -> pa.Table:
    """Read shards whole."""
    import pyarrow.parquet as pq

    names = None if columns is None else list(columns)
    tables = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            tables.append(file.read(columns=names))
    return pa.concat_tables(tables)


def count_rows(paths: Iterable[Path]) -> int:
    """Count rows from the files' footers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in paths)


def read_schema(path: Path) -> pa.Schema:
    """Read a shard's Arrow schema. DataError when the file is no parquet."""
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is no parquet file ({error}); download or write it again"
        ) from error
