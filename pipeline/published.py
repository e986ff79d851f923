"""Pairs of ids that others published, REFUEL's columns: padded ids -> pairs of ours, by arrays."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bulk_filters import Marked, first_reasons
from pipeline.checks import check_batch
from pipeline.columns import PAIR_SIDES, of_side
from pipeline.errors import DataError
from pipeline.ragged import Bools, Ints, bounds_of, list_lengths, lists, numbers, ranges, sums
from pipeline.records import MESSAGE, PAIRS, IntArray, MaskArray, Message, PairExample
from pipeline.repos import Repo
from pipeline.rows import pair_from_row
from pipeline.sifting import Sifted
from pipeline.text_rows import Keys, fork_of, prompt_id_of

REFUEL_PAD = 128256
"""The id behind Llama 3's vocabulary that the published REFUEL datasets are padded with."""

REFUEL_COLUMNS = ("chosen_token", "chosen_mask", "chosen_reward")
READ = [*PAIR_SIDES, *(of_side(s, n) for s in PAIR_SIDES for n in ("token", "mask", "reward"))]
_BATCH_ROWS = 256


def is_published(columns: Collection[str]) -> bool:
    """Say whether these are the columns of a published REFUEL dataset: pairs without segments."""
    return set(READ) <= set(columns) and "chosen_segments" not in columns


def sift_pairs(source: Repo, split: str, max_length: int) -> Iterator[Sifted]:
    """Select from the rows of a published REFUEL dataset, each a pair."""
    keys = Keys()
    for batch in source.batches(split, READ, _BATCH_ROWS):
        yield _sifted(batch, keys, max_length)


def our_pairs(
    batches: Iterable[pa.RecordBatch], dropped: list[dict[str, Any]]
) -> Iterator[pa.RecordBatch]:
    """Stream a published REFUEL dataset as pairs of ours (records.PAIRS).

    Rows left out are appended to `dropped`, each with its `reason`. Raises DataError for a row that
    can't be trained on for no fault that a filter knows.
    """
    keys = Keys()
    for batch in batches:
        sifted = _sifted(batch, keys, None)
        dropped += sifted.dropped
        check_batch(sifted.kept, "pairs")
        if sifted.kept.num_rows:
            yield sifted.kept


def pair_from_published(row: Mapping[str, Any]) -> PairExample:
    """Turn a row of a published REFUEL dataset into a pair, whatever a filter says of it."""
    batch = pa.RecordBatch.from_pylist([{name: row[name] for name in READ}])
    (pair,) = _rows(_read(batch, Keys())).to_pylist()
    return pair_from_row(pair)


@dataclass(frozen=True)
class _Side:
    """One member of N pairs. `bounds` are those of its ids and its mask, without the padding."""

    bounds: Ints
    ids: IntArray
    mask: MaskArray
    reward: Any
    texts: list[list[Message]]
    messages: pa.Array

    @property
    def lengths(self) -> Ints:
        return np.diff(self.bounds)


@dataclass(frozen=True)
class _Pairs:
    """N published pairs. `forks`: the policy turn at which each parts, or None."""

    chosen: _Side
    reject: _Side
    prompt_ids: list[str]
    samples: list[list[int]]
    forks: list[int | None]

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self.chosen, self.reject


def _sifted(batch: pa.RecordBatch, keys: Keys, max_length: int | None) -> Sifted:
    pairs = _read(batch, keys)
    reasons = first_reasons(_marks(pairs, max_length))
    out = [i for i, reason in enumerate(reasons) if reason is not None]
    dropped = [
        {"prompt_id": pairs.prompt_ids[i], "samples": pairs.samples[i], "reason": reasons[i]}
        for i in out
    ]
    rows = _rows(pairs)
    if out:
        rows = rows.filter(pa.array([reason is None for reason in reasons]))
    return Sifted(batch.num_rows, rows, dropped)


def _read(batch: pa.RecordBatch, keys: Keys) -> _Pairs:
    """Read a batch; its rows get the next sample numbers of their prompts.

    Summed log-probs are left out: they belong to a model, not to the data, and are computed anew.
    """
    chosen, reject = (_side(batch, side) for side in PAIR_SIDES)
    names = [prompt_id_of(text) for text in chosen.texts]
    samples = [keys.take(name) for name in names]
    return _Pairs(chosen, reject, names, samples, list(map(fork_of, chosen.texts, reject.texts)))


def _side(batch: pa.RecordBatch, side: str) -> _Side:
    tokens, masks = (batch.column(of_side(side, name)) for name in ("token", "mask"))
    padded, values = bounds_of(list_lengths(tokens)), numbers(tokens.flatten(), -1)
    ends = _last(values != REFUEL_PAD, padded)
    masked = bounds_of(list_lengths(masks))
    if (short := np.diff(masked) < ends).any():
        row = int(np.argmax(short))
        raise DataError(
            f"row {row} of a batch: {side}_mask has {np.diff(masked)[row]} entries for "
            f"{ends[row]} ids"
        )
    return _Side(
        bounds_of(ends),
        values[ranges(padded[:-1], ends)].astype(np.int32),
        numbers(masks.flatten(), 0)[ranges(masked[:-1], ends)].astype(np.uint8),
        numbers(batch.column(f"{side}_reward").cast(pa.float64()), np.nan),
        _texts(batch.column(side)),
        _messages(batch.column(side)),
    )


def _last(marks: Bools, bounds: Ints) -> Ints:
    """Return for each list the place behind its last mark; 0 where it has none."""
    places = np.where(marks, np.arange(1, len(marks) + 1), 0)
    found, held = np.zeros(len(bounds) - 1, dtype=np.int64), np.diff(bounds) > 0
    if held.any():
        found[held] = np.maximum.reduceat(places, bounds[:-1][held])
    return np.maximum(found - bounds[:-1], 0)


def _texts(column: pa.Array) -> list[list[Message]]:
    """Return each row's messages without the null fields that Arrow filled in."""
    flat, bounds = column.flatten(), bounds_of(list_lengths(column)).tolist()
    messages: list[Any] = [{} for _ in range(len(flat))]
    for name in flat.type.names:
        field = pc.struct_field(flat, name)
        if field.null_count < len(field):
            for message, value in zip(messages, field.to_pylist(), strict=True):
                if value is not None:
                    message[name] = value
    return [messages[a:b] for a, b in pairwise(bounds)]


def _messages(column: pa.Array) -> pa.Array:
    """Return messages with every field of ours."""
    flat = column.flatten()
    fields = [
        pc.struct_field(flat, field.name).cast(field.type)
        if field.name in flat.type.names
        else pa.nulls(len(flat), field.type)
        for field in MESSAGE
    ]
    messages = pa.StructArray.from_arrays(fields, fields=list(MESSAGE))
    return lists(bounds_of(list_lengths(column)), messages)


def _marks(pairs: _Pairs, max_length: int | None) -> list[Marked]:
    """Return the filters of our own pairs, in their order."""
    chosen, reject = pairs.sides
    trained = [sums(side.mask, side.bounds) for side in pairs.sides]
    marks = [
        ("no_reward", np.isnan(chosen.reward) | np.isnan(reject.reward)),
        ("empty_response", np.minimum(*trained) == 0),
        ("same_response", _same(chosen, reject, trained)),
        ("tie", chosen.reward == reject.reward),
    ]
    if max_length is not None:
        too_long = np.maximum(chosen.lengths, reject.lengths) > max_length
        marks.insert(2, ("too_long", too_long))
    return marks


def _same(left: _Side, right: _Side, trained: Sequence[Ints]) -> Bools:
    """Mark pairs whose trained ids are the same."""
    same = trained[0] == trained[1]
    for i in np.flatnonzero(same).tolist():
        a, b = (side.ids[cut][side.mask[cut] == 1] for side, cut in _cuts(i, left, right))
        same[i] = np.array_equal(a, b)
    return same


def _cuts(row: int, *sides: _Side) -> Iterator[tuple[_Side, slice]]:
    for side in sides:
        yield side, slice(side.bounds[row], side.bounds[row + 1])


def _rows(pairs: _Pairs) -> pa.RecordBatch:
    """Return the columns of pairs.

    The longest common prefix stands for the context at the fork, which isn't recorded.
    """
    spoken = [sum(m.get("role") == "assistant" for m in text) - 1 for text in pairs.chosen.texts]
    columns: dict[str, Any] = {
        "prompt_id": pa.array(pairs.prompt_ids, pa.string()),
        "branch_turn": pa.array(pairs.forks, pa.int32()),
        "score_turn": pa.array(spoken, pa.int32()),
        "prefix_length": pa.array(_common(*pairs.sides), pa.int32()),
    }
    forks = np.array([fork or 0 for fork in pairs.forks], dtype=np.int64)
    for k, (name, side) in enumerate(zip(PAIR_SIDES, pairs.sides, strict=True)):
        columns[name] = side.messages
        columns[f"{name}_sample"] = pa.array([s[k] for s in pairs.samples], pa.int32())
        columns[f"{name}_token"] = lists(side.bounds, side.ids)
        columns[f"{name}_mask"] = lists(side.bounds, side.mask)
        columns[f"{name}_segments"] = _segments(side)
        columns[f"{name}_spans"] = _spans(side, forks)
        columns[f"{name}_reward"] = pa.array(side.reward)
        kind = PAIRS.field(f"{name}_sample_logprob").type
        columns[f"{name}_sample_logprob"] = pa.nulls(len(forks), kind)
    return pa.RecordBatch.from_arrays([columns[name] for name in PAIRS.names], schema=PAIRS)


def _common(left: _Side, right: _Side) -> Ints:
    """Return how many ids, trained or not alike, each pair's members share from their start."""
    lengths = np.minimum(left.lengths, right.lengths)
    ours, theirs = (ranges(side.bounds[:-1], lengths) for side in (left, right))
    differs = (left.ids[ours] != right.ids[theirs]) | (left.mask[ours] != right.mask[theirs])
    bounds = bounds_of(lengths)
    places = np.where(differs, np.arange(len(ours)), len(ours))
    first, held = bounds[1:].copy(), lengths > 0
    if held.any():
        first[held] = np.minimum.reduceat(places, bounds[:-1][held])
    return np.minimum(first, bounds[1:]) - bounds[:-1]


def _segments(side: _Side) -> pa.Array:
    count = len(side.lengths)
    zeros = np.zeros(count, dtype=np.int32)
    return _structs("segments", np.arange(count + 1), [zeros, side.lengths, zeros])


def _spans(side: _Side, forks: Ints) -> pa.Array:
    """Return where the blocks of the masks are.

    One block is the forked turn's answer; several are the policy's turns, in their order.
    """
    marked, edge = side.mask != 0, np.zeros(len(side.mask) + 1, dtype=bool)
    edge[side.bounds] = True
    starts = np.flatnonzero(marked & (edge[:-1] | ~np.roll(marked, 1)))
    ends = np.flatnonzero(marked & (edge[1:] | ~np.roll(marked, -1))) + 1
    of = np.searchsorted(side.bounds, starts, side="right") - 1
    counts = np.bincount(of, minlength=len(forks))
    bounds = bounds_of(counts)
    turns = np.where(counts[of] == 1, forks[of], np.arange(len(of)) - bounds[of])
    first = side.bounds[of]
    return _structs("spans", bounds, [turns, starts - first, ends - first])


def _structs(name: str, bounds: Ints, values: Sequence[Any]) -> pa.Array:
    struct = PAIRS.field(f"chosen_{name}").type.value_type
    arrays = [pa.array(part, pa.int32()) for part in values]
    return lists(bounds, pa.StructArray.from_arrays(arrays, fields=list(struct)))
