"""Pairs that others published: REFUEL's padded ids, and text with `chosen` and `rejected`."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import filters
from pipeline.columns import PAIR_SIDES, of_side, ragged
from pipeline.errors import RowError
from pipeline.examples import check_pair, common_prefix
from pipeline.prompts import NotADialogue, hh_messages
from pipeline.records import (
    PAIRS,
    IntArray,
    Member,
    Message,
    PairExample,
    Rollout,
    Segment,
    Span,
    TrainingSequence,
)
from pipeline.rows import clean_message, pair_row

REFUEL_PAD = 128256
"""The id behind Llama 3's vocabulary that the published REFUEL datasets are padded with."""

REFUEL_COLUMNS = ("chosen_token", "chosen_mask", "chosen_reward")
TEXT_COLUMNS = ("chosen", "rejected")
READ = [*PAIR_SIDES, *(of_side(s, n) for s in PAIR_SIDES for n in ("token", "mask", "reward"))]
_BATCH_ROWS = 256


def is_published(columns: Collection[str]) -> bool:
    """Say whether these are the columns of a published REFUEL dataset: pairs without segments."""
    return set(READ) <= set(columns) and "chosen_segments" not in columns


def our_pairs(
    batches: Iterable[pa.RecordBatch], dropped: list[dict[str, Any]]
) -> Iterator[pa.RecordBatch]:
    """Stream a published REFUEL dataset as pairs of ours (records.PAIRS).

    Rows left out are appended to `dropped`, each with its `reason`. Raises DataError for a row that
    can't be trained on for no fault that a filter knows.
    """
    results = published_pairs(chain.from_iterable(map(_rows, batches)))
    while some := list(islice(results, _BATCH_ROWS)):
        dropped += [row for _, left_out in some for row in left_out]
        pairs = [pair for kept, _ in some for pair in kept]
        for pair in pairs:
            check_pair(pair)
        if pairs:
            yield pa.RecordBatch.from_pylist([pair_row(pair) for pair in pairs], schema=PAIRS)


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
    fork = _fork(*texts)
    chosen, reject = (
        Member(k, texts[k], _unpadded(row, side, fork or 0, pad_id), float(row[f"{side}_reward"]))
        for k, side in enumerate(("chosen", "reject"))
    )
    prefix = common_prefix(chosen.sequence.ids, reject.sequence.ids)
    score_turn = sum(message["role"] == "assistant" for message in texts[0]) - 1
    return PairExample(_prompt_id(texts[0]), fork, score_turn, chosen, reject, prefix)


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


def rollouts_of_text(row: Mapping[str, Any]) -> list[Rollout]:
    """Turn a pair of texts (HH, trl-style) into two rollouts without ids that part at a turn.

    `score_chosen` and `score_rejected` are their rewards where a dataset has them; a mere
    preference is 1 and 0. Raises RowError for what is no dialogue.
    """
    texts = [_messages(row[side]) for side in TEXT_COLUMNS]
    fork = _fork(*texts)
    if fork is None:
        raise RowError("not_a_pair", "the texts don't part at an answer")
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    rewards = [1.0, 0.0] if None in scores else [float(score or 0.0) for score in scores]
    return [_rollout(texts[k], k, fork, rewards[k]) for k in range(2)]


def _rollout(messages: list[Message], sample: int, fork: int, reward: float) -> Rollout:
    # The text after the last answer (HH has a few) is nothing that the policy said.
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return Rollout(
        prompt_id=_prompt_id(messages),
        sample=sample,
        messages=messages[: spoken[-1] + 1],
        turns=None,
        branch_turn=fork,
        score_turn=len(spoken) - 1,
        status="complete",
        end_reason="text",
        rewards=[None] * (len(spoken) - 1) + [reward],
    )


def _messages(value: Any) -> list[Message]:
    try:
        if isinstance(value, str):
            return hh_messages(value)
        return [Message(role=item["role"], content=item["content"]) for item in value]
    except (NotADialogue, KeyError, TypeError) as error:
        raise RowError("not_a_dialogue", str(error)) from None


def _fork(left: list[Message], right: list[Message]) -> int | None:
    """Return the policy turn at which two dialogues part; None where it is no turn of both's."""
    shorter = min(len(left), len(right))
    first = next((i for i in range(shorter) if left[i] != right[i]), None)
    if first is None or any(text[first]["role"] != "assistant" for text in (left, right)):
        return None
    return sum(message["role"] == "assistant" for message in left[:first])


def _prompt_id(messages: list[Message]) -> str:
    """Hash what comes before the first answer, so that pairs of one prompt share a split."""
    end = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    text = json.dumps(messages[:end], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Keys:
    """Sample numbers for pairs that came without: the k-th pair of a prompt has 2k and 2k+1."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def take(self, prompt_id: str) -> tuple[int, int]:
        """Return the numbers of a prompt's next pair."""
        first = 2 * self._seen[prompt_id]
        self._seen[prompt_id] += 1
        return first, first + 1


def published_pairs(
    rows: Iterable[Mapping[str, Any]], max_length: int | None = None
) -> Iterator[tuple[list[PairExample], list[dict[str, Any]]]]:
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


def text_rollouts(
    rows: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[list[Rollout], list[dict[str, Any]]]]:
    """Yield, for each pair of texts, its two rollouts or why it is dropped."""
    keys = Keys()
    for place, row in enumerate(rows):
        try:
            pair = rollouts_of_text(row)
        except RowError as error:
            yield [], [{"row": place, "reason": error.reason, "detail": error.detail}]
        else:
            for rollout, sample in zip(pair, keys.take(pair[0].prompt_id), strict=True):
                rollout.sample = sample
            yield pair, []
