"""Arrow columns of pairs and groups -> examples for training; ids stay where Arrow put them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from pipeline.packing import Example, Strand
from pipeline.records import Segment

PAIR_SIDES = ("chosen", "reject")
NO_ONE = ""


def side_columns(sides: Sequence[str], numbers: Iterable[str] = ()) -> list[str]:
    """Name the columns that training reads: `chosen_token`, ..., or `token`, ... for groups."""
    names = ["token", "mask", "segments", *numbers]
    return [f"{_prefix(side)}{name}" for side in sides for name in names]


def _prefix(side: str) -> str:
    return f"{side}_" if side else ""


def pairs(batches: Iterable[pa.RecordBatch], numbers: Mapping[str, str]) -> list[Example]:
    """Read pairs: two strands, `chosen` and `reject`.

    `numbers` maps what a loss calls its per-id numbers to the column's name without its side.
    """
    examples: list[Example] = []
    for batch in batches:
        sides = {side: _strands(batch, side, numbers) for side in PAIR_SIDES}
        names = batch.column("prompt_id").to_pylist()
        for i, name in enumerate(names):
            strands = {side: column[i] for side, column in sides.items()}
            examples.append(Example(name, strands))
    return examples


def rollouts(batches: Iterable[pa.RecordBatch], numbers: Mapping[str, str]) -> list[Example]:
    """Read a groups repo, one example a rollout: a single strand, `response`."""
    examples: list[Example] = []
    for batch in batches:
        strands = _strands(batch, NO_ONE, numbers)
        names = batch.column("prompt_id").to_pylist()
        examples += [
            Example(name, {"response": strand}) for name, strand in zip(names, strands, strict=True)
        ]
    return examples


def _strands(batch: pa.RecordBatch, side: str, numbers: Mapping[str, str]) -> list[Strand]:
    prefix = _prefix(side)
    ids, masks = ragged(batch.column(f"{prefix}token")), ragged(batch.column(f"{prefix}mask"))
    cuts = _segments(batch.column(f"{prefix}segments"))
    held = {name: ragged(batch.column(f"{prefix}{column}")) for name, column in numbers.items()}
    rewards = [0.0] * batch.num_rows
    if f"{prefix}reward" in batch.schema.names:
        rewards = batch.column(f"{prefix}reward").to_pylist()
    return [
        Strand(ids[i], masks[i], cuts[i], rewards[i] or 0.0, {k: v[i] for k, v in held.items()})
        for i in range(batch.num_rows)
    ]


def ragged(column: pa.ListArray) -> list[Any]:
    """Return each row's values as a NumPy view of the column's buffer."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(offsets)]


def _segments(column: pa.ListArray) -> list[list[Segment]]:
    parts = [column.values.field(name).to_pylist() for name in ("start", "length", "keep")]
    flat = [Segment(*part) for part in zip(*parts, strict=True)]
    offsets = column.offsets.to_pylist()
    return [flat[a:b] for a, b in pairwise(offsets)]
