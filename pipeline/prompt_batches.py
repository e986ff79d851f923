"""Read rollouts in batches of whole prompts: key order, one type for each column, flat memory."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.ragged import Ints, numbers
from pipeline.repos import Repo
from pipeline.rollout_arrays import NEEDED, USED, cast, typed

BATCH_ROWS = 1024


def whole_prompts(source: Repo, split: str, rewarded: bool) -> Iterator[pa.RecordBatch]:
    """Stream the rollouts of a split, those of a prompt together and by sample.

    A repo in another order is read whole and sorted. Raises DataError for a column that is missing
    or of another kind, and for a key that is null or occurs twice.
    """
    source.require([*NEEDED, "rewards"] if rewarded else NEEDED)
    columns = [name for name in USED if name in set(source.columns(split))]
    batches: Iterable[pa.RecordBatch]
    if _is_together(source, split):
        read = source.batches(split, columns, BATCH_ROWS)
        batches = (typed(batch, source.name) for batch in read if batch.num_rows)
    else:
        table = source.table(split, columns)
        batches = _sorted([typed(batch, source.name) for batch in table.to_batches()])
    for batch in _joined(batches):
        yield _by_sample(batch, source.name)


def _is_together(source: Repo, split: str) -> bool:
    names = source.table(split, ["prompt_id"]).column("prompt_id")
    if names.null_count:
        raise DataError(f"{source.name}: {names.null_count} rollouts have no prompt_id")
    if not len(names):
        return True
    where = f"{source.name}, column 'prompt_id'"
    names = pa.concat_arrays([cast(chunk, pa.string(), where) for chunk in names.chunks])
    runs = 1 + pc.sum(pc.not_equal(names[1:], names[:-1]), min_count=0).as_py()
    return runs <= len(pc.unique(names))


def _sorted(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield rows in key order; in pieces, since 2 GB of text don't fit one array."""
    keys = pa.Table.from_batches([batch.select(["prompt_id", "sample"]) for batch in batches])
    order = pc.sort_indices(keys, [("prompt_id", "ascending"), ("sample", "ascending")])
    firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    rows = order.to_numpy().astype(np.int64)
    for start in range(0, len(rows), BATCH_ROWS):
        yield _gathered(batches, firsts, rows[start : start + BATCH_ROWS])


def _gathered(batches: list[pa.RecordBatch], firsts: Ints, rows: Ints) -> pa.RecordBatch:
    holders = np.searchsorted(firsts, rows, side="right") - 1
    parts, places = [], []
    for holder in np.unique(holders).tolist():
        held = np.flatnonzero(holders == holder)
        parts.append(batches[holder].take(pa.array(rows[held] - firsts[holder])))
        places.append(held)
    return pa.concat_batches(parts).take(pa.array(np.argsort(np.concatenate(places))))


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut between prompts instead of anywhere: the last prompt waits for the next batch."""
    held: pa.RecordBatch | None = None
    for batch in batches:
        if held is None:
            held = batch
            continue
        names = held.column("prompt_id")
        last = names[-1].as_py()
        if batch.column("prompt_id")[0].as_py() != last:
            yield held
            held = batch
            continue
        # Of the last prompt, not of any that bears its name further up: they are together.
        start = pc.index(names, last).as_py()
        if start:
            yield held.slice(0, start)
        held = pa.concat_batches([held.slice(start), batch])
    if held is not None:
        yield held


def _by_sample(batch: pa.RecordBatch, source: str) -> pa.RecordBatch:
    """Order the rollouts of each prompt by sample. DataError for a key that occurs twice."""
    names = batch.column("prompt_id")
    if batch.column("sample").null_count:
        raise DataError(f"{source}: a rollout of prompt {names[0]} or a later one has no sample")
    samples = numbers(batch.column("sample"), 0).astype(np.int64)
    same = numbers(pc.equal(names[1:], names[:-1]), False)
    if (same & (samples[1:] < samples[:-1])).any():
        prompts = np.concatenate([[0], np.cumsum(~same)])
        order = np.lexsort([samples, prompts])
        batch, samples = batch.take(pa.array(order)), samples[order]
    twice = np.flatnonzero(same & (samples[1:] == samples[:-1]))
    if len(twice):
        name = batch.column("prompt_id")[int(twice[0])]
        raise DataError(f"{source}: prompt {name} has two rollouts of one sample")
    return batch
