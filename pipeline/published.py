"""Pairs of ids that others published: REFUEL's columns, padded."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from pipeline import filters
from pipeline.columns import PAIR_SIDES, of_side, ragged
from pipeline.examples import check_pair, common_prefix
from pipeline.records import (
    IntArray,
    Member,
    PairExample,
    Segment,
    Span,
    TrainingSequence,
)
from pipeline.repos import Repo
from pipeline.rows import clean_message
from pipeline.sifting import Sifted, rows_of
from pipeline.text_rows import Keys, fork_of, prompt_id_of

REFUEL_PAD = 128256
"""The id behind Llama 3's vocabulary that the published REFUEL datasets are padded with."""

REFUEL_COLUMNS = ("chosen_token", "chosen_mask", "chosen_reward")
READ = [*PAIR_SIDES, *(of_side(s, n) for s in PAIR_SIDES for n in ("token", "mask", "reward"))]
_BATCH_ROWS = 256

Found: TypeAlias = tuple[list[PairExample], list[dict[str, Any]]]
"""The pair of a row, or why it is dropped."""


def is_published(columns: Collection[str]) -> bool:
    """Say whether these are the columns of a published REFUEL dataset: pairs without segments."""
    return set(READ) <= set(columns) and "chosen_segments" not in columns


def sift_pairs(source: Repo, split: str, max_length: int) -> Iterator[Sifted]:
    """Select from the rows of a published REFUEL dataset, each a pair."""
    results = _pairs(source.batches(split, READ, _BATCH_ROWS), max_length)
    while some := list(islice(results, _BATCH_ROWS)):
        kept = [pair for pairs, _ in some for pair in pairs]
        dropped = [row for _, left_out in some for row in left_out]
        yield Sifted(len(some), rows_of(kept, "pairs"), dropped)


def our_pairs(
    batches: Iterable[pa.RecordBatch], dropped: list[dict[str, Any]]
) -> Iterator[pa.RecordBatch]:
    """Stream a published REFUEL dataset as pairs of ours (records.PAIRS).

    Rows left out are appended to `dropped`, each with its `reason`. Raises DataError for a row that
    can't be trained on for no fault that a filter knows.
    """
    results = _pairs(batches)
    while some := list(islice(results, _BATCH_ROWS)):
        dropped += [row for _, left_out in some for row in left_out]
        pairs = [pair for kept, _ in some for pair in kept]
        for pair in pairs:
            check_pair(pair)
        if pairs:
            yield rows_of(pairs, "pairs")


def _pairs(batches: Iterable[pa.RecordBatch], max_length: int | None = None) -> Iterator[Found]:
    return published_pairs(chain.from_iterable(map(_rows, batches)), max_length)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield rows whose ids and masks are views of Arrow's buffers: 2048 of each, mostly padding."""
    columns = {
        name: ragged(batch.column(name))
        if name.endswith(("_token", "_mask"))
        else batch.column(name).to_pylist()
        for name in READ
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def pair_from_published(row: Mapping[str, Any], pad_id: int = REFUEL_PAD) -> PairExample:
    """Turn a row of a published REFUEL dataset into a pair.

    Its summed log-probs are left out: they belong to a model, not to the data, and are computed
    anew. The longest common prefix stands for the context at the fork, which isn't recorded.
    """
    texts = [[clean_message(message) for message in row[side]] for side in ("chosen", "reject")]
    fork = fork_of(*texts)
    chosen, reject = (
        Member(k, texts[k], _unpadded(row, side, fork or 0, pad_id), float(row[f"{side}_reward"]))
        for k, side in enumerate(("chosen", "reject"))
    )
    prefix = common_prefix(chosen.sequence.ids, reject.sequence.ids)
    score_turn = sum(message["role"] == "assistant" for message in texts[0]) - 1
    return PairExample(prompt_id_of(texts[0]), fork, score_turn, chosen, reject, prefix)


def _unpadded(row: Mapping[str, Any], side: str, turn: int, pad_id: int) -> TrainingSequence:
    padded: IntArray = np.asarray(row[f"{side}_token"], dtype=np.int32)
    ids = padded[: int(np.max(np.flatnonzero(padded != pad_id), initial=-1)) + 1]
    mask = np.asarray(row[f"{side}_mask"], dtype=np.uint8)[: len(ids)]
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
    blocks = list(zip(edges[::2], edges[1::2], strict=True))
    # One block is the forked turn's answer; several are the policy's turns, in their order.
    first = turn if len(blocks) == 1 else 0
    spans = [Span(first + k, start, end) for k, (start, end) in enumerate(blocks)]
    return TrainingSequence(ids, mask, [Segment(0, len(ids), 0)], spans)


def published_reason(pair: PairExample, max_length: int | None) -> str | None:
    """Return the first reason against a published pair; the filters of our own pairs."""
    sequences = (pair.chosen.sequence, pair.reject.sequence)
    too_long = (filters.too_long(s, max_length) for s in sequences if max_length is not None)
    return (
        next(filter(None, map(filters.empty_response, sequences)), None)
        or next(filter(None, too_long), None)
        or filters.same_response(pair.chosen, pair.reject)
        or filters.tie(pair.chosen, pair.reject)
    )


def published_pairs(
    rows: Iterable[Mapping[str, Any]], max_length: int | None = None
) -> Iterator[Found]:
    """Yield, for each row of a published REFUEL dataset, its pair or why it is dropped."""
    keys = Keys()
    for row in rows:
        pair = pair_from_published(row)
        pair.chosen.sample, pair.reject.sample = keys.take(pair.prompt_id)
        if reason := published_reason(pair, max_length):
            samples = [pair.chosen.sample, pair.reject.sample]
            yield [], [{"prompt_id": pair.prompt_id, "samples": samples, "reason": reason}]
        else:
            yield [pair], []
