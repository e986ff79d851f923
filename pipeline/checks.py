"""Check pairs and groups as they are on disk, whole, before they count as written.

Every promise that examples.py checks row by row, as array operations over the columns; and those
that only the whole output can break: keys, splits, counts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bulk_filters import unlike
from pipeline.columns import NO_ONE, PAIR_SIDES, of_side
from pipeline.errors import DataError
from pipeline.ragged import Bools, Ints, anywhere, bounds_of, list_lengths, numbers, owners, sums
from pipeline.records import GROUPS, PAIRS
from pipeline.shards import read_batches, read_schema

Shards: TypeAlias = Mapping[str, Sequence[Path]]
Problem: TypeAlias = tuple[str, Bools]

KEYS = {
    "pairs": ["prompt_id", "chosen_sample", "reject_sample"],
    "groups": ["prompt_id", "sample"],
}
_BATCH_ROWS = 1024


def checker(kind: str, rows: int, vocabulary: int = 0) -> Callable[[Shards], None]:
    """Return what raises DataError, with the row's name, for the first broken promise.

    `rows` is how many there must be; `vocabulary` 0: unknown.
    """
    schema = PAIRS if kind == "pairs" else GROUPS

    def check(shards: Shards) -> None:
        try:
            check_all(shards)
        except DataError as error:
            raise DataError(f"{error}. Nothing was published") from None

    def check_all(shards: Shards) -> None:
        keys: dict[str, list[pa.RecordBatch]] = {}
        for split, paths in shards.items():
            keys[split] = []
            for batch in _read(paths, schema):
                check_batch(batch, kind, vocabulary)
                keys[split].append(batch.select(KEYS[kind]))
        _check_keys({split: pa.Table.from_batches(parts) for split, parts in keys.items()}, rows)

    return check


def check_batch(batch: pa.RecordBatch, kind: str, vocabulary: int = 0) -> None:
    """Raise DataError, with the row's name, for the first promise that a row breaks."""
    sides = PAIR_SIDES if kind == "pairs" else (NO_ONE,)
    _raise_first(batch, kind, list(_problems(batch, sides, vocabulary)))


def _read(paths: Sequence[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for path in paths:
        if not read_schema(path).equals(schema):
            raise DataError(f"{path.name} hasn't the columns and types that it should have")
    # Messages are what people look at; no promise is about them.
    columns = [name for name in schema.names if name not in PAIR_SIDES]
    yield from read_batches(paths, columns, _BATCH_ROWS)


def _raise_first(batch: pa.RecordBatch, kind: str, problems: Sequence[Problem]) -> None:
    wrong = [(int(np.argmax(rows)), problem) for problem, rows in problems if rows.any()]
    if wrong:
        row, problem = min(wrong, key=lambda one: one[0])
        raise DataError(f"{_name_of(batch, row, kind)}{problem}")


def _name_of(batch: pa.RecordBatch, row: int, kind: str) -> str:
    values = [batch.column(name)[row] for name in KEYS[kind]]
    if kind == "pairs":
        return f"prompt {values[0]}, samples {values[1]} and {values[2]}"
    return f"prompt {values[0]}, sample {values[1]}"


def _problems(batch: pa.RecordBatch, sides: Sequence[str], vocabulary: int) -> Iterator[Problem]:
    """Yield (what a row breaks, which rows break it), the graver first."""
    lengths = []
    for side in sides:
        ids, masks = (batch.column(of_side(side, name)) for name in ("token", "mask"))
        bounds = bounds_of(list_lengths(ids))
        lengths.append(bounds)
        where = f" ({side}): " if side else ": "
        if not np.array_equal(bounds, bounds_of(list_lengths(masks))):
            unequal = list_lengths(ids) != list_lengths(masks)
            yield f"{where}the mask hasn't an entry for each id", unequal
            return  # what is compared id by id below would be out of step
        mask = masks.flatten().to_numpy(zero_copy_only=False)
        checks = (
            *_mask_problems(mask, bounds),
            *_span_problems(batch.column(of_side(side, "spans")), mask, bounds),
            *_segment_problems(batch.column(of_side(side, "segments")), bounds),
            *_id_problems(ids, bounds, vocabulary),
            *_number_problems(batch, side, sums(mask, bounds)),
        )
        yield from ((where + problem, rows) for problem, rows in checks)
    if len(sides) == 2:
        yield from _prefix_problems(batch, lengths)


def _mask_problems(mask: npt.NDArray[np.uint8], bounds: Ints) -> Iterator[Problem]:
    yield "a mask is neither 0 nor 1", anywhere(mask > 1, bounds)
    yield "no id trains", sums(mask, bounds) == 0
    held = np.diff(bounds) > 0
    first = np.zeros(len(held), dtype=bool)
    first[held] = mask[bounds[:-1][held]] != 0
    yield "the first id trains, but nothing precedes it", first


def _span_problems(
    column: pa.Array, mask: npt.NDArray[np.uint8], bounds: Ints
) -> Iterator[Problem]:
    spans = bounds_of(list_lengths(column))
    turn, start, end = _fields(column, ("turn", "start", "end"))
    of = owners(spans)
    size = np.diff(bounds)[of]
    wrong = (start < _previous(end, spans, 0)) | (end < start) | (end > size)
    wrong |= turn <= _previous(turn, spans, -1)
    yield "spans overlap, or aren't within the ids", anywhere(wrong, spans)
    # Where spans don't overlap, they hold every trained id if they hold as many as there are.
    before = np.zeros(len(mask) + 1, dtype=np.int32)
    np.cumsum(mask, dtype=np.int32, out=before[1:])
    edges = [before[bounds[:-1][of] + np.clip(edge, 0, size)] for edge in (start, end)]
    held = sums(edges[1] - edges[0], spans)
    yield "an id trains that was not sampled", held < np.diff(before[bounds])


def _segment_problems(column: pa.Array, bounds: Ints) -> Iterator[Problem]:
    segments = bounds_of(list_lengths(column))
    start, length, keep = _fields(column, ("start", "length", "keep"))
    wrong = (start != _previous(start + length, segments, 0)) | (length < 1)
    covered = sums(length, segments) == np.diff(bounds)
    yield "the segments don't tile the ids", anywhere(wrong, segments) | ~covered
    unseen = (keep < 0) | (keep > _previous(keep + length, segments, 0))
    yield "a segment keeps more ids than came before it", anywhere(unseen, segments)


def _id_problems(column: pa.Array, bounds: Ints, vocabulary: int) -> Iterator[Problem]:
    ids = numbers(column.flatten(), -1)
    outside = (ids < 0) | (ids >= vocabulary) if vocabulary else ids < 0
    size = f"a vocabulary of {vocabulary}" if vocabulary else "any vocabulary"
    yield f"an id is outside of {size}", anywhere(outside, bounds)


def _number_problems(batch: pa.RecordBatch, side: str, trained: Ints) -> Iterator[Problem]:
    for name in ("sample_logprob", "advantage"):
        if (told := of_side(side, name)) in batch.schema.names:
            column = batch.column(told)
            bounds = bounds_of(list_lengths(column))
            finite = np.isfinite(numbers(column.flatten(), np.nan))
            given = pc.is_valid(column).to_numpy(zero_copy_only=False)
            wrong = given & (np.diff(bounds) != trained) | anywhere(~finite, bounds)
            yield f"{told} hasn't a finite number for each trained id", wrong


def _prefix_problems(batch: pa.RecordBatch, bounds: Sequence[Ints]) -> Iterator[Problem]:
    shared = numbers(batch.column("prefix_length"), -1).astype(np.int64)
    ours, theirs = (
        [
            batch.column(of_side(side, name)).flatten().to_numpy(zero_copy_only=False)
            for name in ("token", "mask")
        ]
        for side in PAIR_SIDES
    )
    wrong = unlike(ours, bounds[0], theirs, bounds[1], np.maximum(shared, 0)) | (shared < 0)
    yield ": the two don't begin with the same ids and masks, prefix_length of them", wrong


def _fields(column: pa.Array, names: Sequence[str]) -> list[Ints]:
    flat = column.flatten()
    return [numbers(pc.struct_field(flat, name), -1).astype(np.int64) for name in names]


def _previous(values: Ints, bounds: Ints, first: int) -> Ints:
    """Return for each value the one before it in its list; `first` for a list's first."""
    before = np.empty_like(values)
    before[1:] = values[:-1]
    before[bounds[:-1][np.diff(bounds) > 0]] = first
    return before


def _check_keys(keys: Mapping[str, pa.Table], rows: int) -> None:
    """Raise DataError unless keys are unique, splits share no prompt, and every row is there."""
    together = pa.concat_tables(keys.values()).combine_chunks()
    if together.num_rows != rows:
        raise DataError(f"{together.num_rows} rows were written where {rows} were kept")
    counts = together.group_by(together.column_names).aggregate([([], "count_all")])
    if counts.num_rows < rows:
        twice = counts.filter(pc.greater(counts.column("count_all"), 1)).slice(0, 1).to_pylist()[0]
        raise DataError(f"a key occurs {twice.pop('count_all')} times: {twice}")
    seen: list[pa.Array] = []
    for split, table in keys.items():
        names = pc.unique(table.column("prompt_id"))
        for others in seen:
            shared = names.filter(pc.is_in(names, others))
            if len(shared):
                raise DataError(f"prompt {shared[0]} is in the split {split!r} and in another one")
        seen.append(names)
