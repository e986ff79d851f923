"""Arrow columns of pairs and groups -> examples for training; ids stay where Arrow put them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.packing import Example, Strand
from pipeline.records import Segment

PAIR_SIDES = ("chosen", "reject")
NO_ONE = ""


def side_columns(sides: Sequence[str], numbers: Iterable[str] = ()) -> list[str]:
    """Name the columns that training reads: `chosen_token`, ..., or `token`, ... for groups."""
    names = ["token", "mask", "segments", *numbers]
    return [of_side(side, name) for side in sides for name in names]


def of_side(side: str, name: str) -> str:
    """Name one side's column: `chosen_mask`, or `mask` for groups."""
    return f"{side}_{name}" if side else name


def examples(
    batch: pa.RecordBatch, sides: Sequence[str], numbers: Mapping[str, str]
) -> list[Example]:
    """Read pairs or, where there is only one side, groups."""
    return groups([batch], numbers) if sides == (NO_ONE,) else pairs([batch], numbers)


def pairs(batches: Iterable[pa.RecordBatch], numbers: Mapping[str, str]) -> list[Example]:
    """Read pairs: two strands, `chosen` and `reject`.

    `numbers` maps what a loss calls its per-id numbers to the column's name without its side.
    """
    found: list[Example] = []
    for batch in batches:
        sides = {side: _strands(batch, side, numbers) for side in PAIR_SIDES}
        names = batch.column("prompt_id").to_pylist()
        for i, name in enumerate(names):
            strands = {side: column[i] for side, column in sides.items()}
            found.append(Example(name, strands))
    return found


def rollouts(batches: Iterable[pa.RecordBatch], numbers: Mapping[str, str]) -> list[Example]:
    """Read a groups repo, one example a rollout: a single strand, `response`."""
    return [
        Example(name, {"response": strand})
        for batch in batches
        for name, strand in _named(batch, numbers)
    ]


def groups(batches: Iterable[pa.RecordBatch], numbers: Mapping[str, str]) -> list[Example]:
    """Read a groups repo, one example for the rollouts of a prompt that follow one another.

    Its strands are `0`, `1`, ... in their order.
    """
    named = chain.from_iterable(_named(batch, numbers) for batch in batches)
    return [
        Example(name, {str(k): strand for k, (_, strand) in enumerate(members)})
        for name, members in groupby(named, key=lambda one: one[0])
    ]


def _named(batch: pa.RecordBatch, numbers: Mapping[str, str]) -> list[tuple[str, Strand]]:
    names = batch.column("prompt_id").to_pylist()
    return list(zip(names, _strands(batch, NO_ONE, numbers), strict=True))


def _strands(batch: pa.RecordBatch, side: str, numbers: Mapping[str, str]) -> list[Strand]:
    ids, masks = (ragged(batch.column(of_side(side, name))) for name in ("token", "mask"))
    cuts = _segments(batch.column(of_side(side, "segments")))
    held = {name: ragged(batch.column(of_side(side, column))) for name, column in numbers.items()}
    rewards = [0.0] * batch.num_rows
    if of_side(side, "reward") in batch.schema.names:
        rewards = batch.column(of_side(side, "reward")).to_pylist()
    return [
        Strand(ids[i], masks[i], cuts[i], rewards[i] or 0.0, {k: v[i] for k, v in held.items()})
        for i in range(batch.num_rows)
    ]


def offsets(column: pa.Array) -> list[int]:
    """Return where each row's values begin and end in the flattened column."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).tolist()


def ragged(column: pa.Array) -> list[Any]:
    """Return each row's values as a NumPy view of the column's buffer; no values for null."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(offsets(column))]


def structs(column: pa.Array, names: Sequence[str]) -> list[list[tuple[Any, ...]]]:
    """Return each row's list of structs as tuples of these fields."""
    flat = column.flatten()
    parts = [pc.struct_field(flat, name).to_pylist() for name in names]
    rows = list(zip(*parts, strict=True))
    return [rows[a:b] for a, b in pairwise(offsets(column))]


def _segments(column: pa.Array) -> list[list[Segment]]:
    return [
        [Segment(*part) for part in row] for row in structs(column, ("start", "length", "keep"))
    ]
