"""Rollouts -> ids + mask + spans; pairs and groups. Ids and mask are built by the same call.

A mask names the policy turns that train: `forked` the turn at which the rollouts of a prompt part,
`last` the score turn, `all` every turn up to it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from pipeline.errors import DataError
from pipeline.filters import policy_messages, reward_of
from pipeline.records import (
    FloatArray,
    GroupExample,
    IntArray,
    Member,
    Message,
    PairExample,
    Rollout,
    Segment,
    Span,
    TrainingSequence,
    Turn,
)

MASKS = ("forked", "last", "all")


class Encoder(Protocol):
    """What encodes text that has no ids yet: chat.Chat."""

    def encode_dialogue(
        self, messages: Sequence[Message], tools: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a dialogue and the (start, end) of each assistant turn in them."""
        ...


def trained_turns(rollout: Rollout, mask: str) -> list[int]:
    """Return the policy turns that train. Raises DataError for `forked` without a fork."""
    if mask == "all":
        return list(range(rollout.score_turn + 1))
    if mask == "last":
        return [rollout.score_turn]
    if rollout.branch_turn is None:
        raise no_fork(rollout.prompt_id)
    return [rollout.branch_turn]


def no_fork(prompt_id: str) -> DataError:
    """Return what is wrong where `forked` is asked for and the rollouts share only the prompt."""
    return DataError(
        f"the rollouts of prompt {prompt_id} share only the prompt, so no turn of "
        "theirs is a fork: use --mask last or --mask all"
    )


def sequence_of(rollout: Rollout, trained: Sequence[int], chat: Encoder | None) -> TrainingSequence:
    """Return what a rollout trains on, up to its last trained turn.

    One turn gives the ids that the policy saw there and sampled: one flat segment. Several turns
    give a segment for each context that isn't the last one continued. Text without ids is encoded
    by `chat`; RowError says where that can't be done.
    """
    if rollout.turns is None:
        assert chat is not None, "text needs a chat template"
        return _sequence_of_text(rollout, trained, chat)
    turns = rollout.turns[: trained[-1] + 1]
    return _flat(turns) if len(trained) == 1 else _segmented(turns, trained)


def _flat(turns: Sequence[Turn]) -> TrainingSequence:
    """Return the context of the last turn and its response, which trains."""
    ids, spans = np.empty(0, dtype=np.int32), list[Span]()
    for t, turn in enumerate(turns):
        # A span that a rewritten context cuts into is no longer what was sampled.
        spans = [span for span in spans if span.end <= turn.keep]
        ids, span = _extend(ids[: turn.keep], t, turn)
        spans.append(span)
    return _sequence(ids, [Segment(0, len(ids), 0)], spans, {len(turns) - 1})


def _segmented(turns: Sequence[Turn], trained: Sequence[int]) -> TrainingSequence:
    """Return every turn's ids once, in segments; `seen` is the length of the context so far."""
    ids = np.empty(0, dtype=np.int32)
    segments, spans, seen = list[Segment](), list[Span](), 0
    for t, turn in enumerate(turns):
        start = len(ids)
        ids, span = _extend(ids, t, turn)
        spans.append(span)
        if segments and turn.keep == seen:
            segments[-1].length += len(ids) - start
        else:
            segments.append(Segment(start, len(ids) - start, turn.keep))
        seen = turn.keep + len(ids) - start
    return _sequence(ids, segments, spans, set(trained))


def _extend(ids: IntArray, index: int, turn: Turn) -> tuple[IntArray, Span]:
    parts = [np.asarray(part, dtype=np.int32) for part in (turn.prompt_ids, turn.response_ids)]
    longer = np.concatenate([ids, *parts])
    return longer, Span(index, len(longer) - len(parts[1]), len(longer))


def _sequence_of_text(rollout: Rollout, trained: Sequence[int], chat: Encoder) -> TrainingSequence:
    last = policy_messages(rollout)[trained[-1]]
    found, edges = chat.encode_dialogue(rollout.messages[: last + 1], rollout.tools)
    spans = [Span(t, start, end) for t, (start, end) in enumerate(edges)]
    ids = np.asarray(found[: spans[-1].end], dtype=np.int32)
    return _sequence(ids, [Segment(0, len(ids), 0)], spans, set(trained))


def _sequence(
    ids: IntArray, segments: list[Segment], spans: list[Span], trained: set[int]
) -> TrainingSequence:
    mask = np.zeros(len(ids), dtype=np.uint8)
    for span in spans:
        if span.turn in trained:
            mask[span.start : span.end] = 1
    return TrainingSequence(ids, mask, segments, spans)


def sample_logprob(rollout: Rollout, trained: Sequence[int]) -> FloatArray | None:
    """Return the engine's log-prob of each trained id, or None where any is missing."""
    if rollout.turns is None:
        return None
    logprobs = [rollout.turns[t].logprobs for t in trained]
    kept = [np.asarray(turn, dtype=np.float32) for turn in logprobs if turn is not None]
    return np.concatenate(kept) if len(kept) == len(logprobs) else None


def member_of(rollout: Rollout, trained: Sequence[int], sequence: TrainingSequence) -> Member:
    """Return one side of a pair; its messages end with the score turn, what trains may end before.

    The rollout must have a reward at its score turn.
    """
    reward = reward_of(rollout)
    assert reward is not None, "a member has a reward"
    end = policy_messages(rollout)[rollout.score_turn] + 1
    logprobs = sample_logprob(rollout, trained)
    return Member(rollout.sample, rollout.messages[:end], sequence, reward, logprobs)


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """Return the places of the highest and the lowest reward; the first of equals.

    Two rewards give the pair in REFUEL's order: chosen, reject.
    """
    best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
    return (0, 1) if best == worst else (best, worst)


def pair_of(left: Rollout, chosen: Member, reject: Member) -> PairExample:
    """Return the pair of two members of `left`'s prompt, `left` being the chosen rollout."""
    prefix = prefix_length(chosen.sequence, reject.sequence, left.branch_turn or 0)
    return PairExample(left.prompt_id, left.branch_turn, left.score_turn, chosen, reject, prefix)


def prefix_length(left: TrainingSequence, right: TrainingSequence, fork: int) -> int:
    """Return the length of the context that both saw at the fork, where both still hold it.

    Where a rewritten context has dropped the fork: what the ids have in common before any trains.
    """
    starts = [_start(sequence, fork) for sequence in (left, right)]
    if starts[0] is not None and starts[1] is not None:
        return max(starts[0], starts[1])  # unlike ones are told apart by `different_prefix`
    return min(
        common_prefix(left.ids, right.ids), int(left.mask.argmax()), int(right.mask.argmax())
    )


def _start(sequence: TrainingSequence, turn: int) -> int | None:
    return next((span.start for span in sequence.spans if span.turn == turn), None)


def common_prefix(left: IntArray, right: IntArray) -> int:
    """Return how many ids two sequences share from their start."""
    shorter = min(len(left), len(right))
    differs = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differs[0]) if len(differs) else shorter


def group_of(
    rollout: Rollout,
    trained: Sequence[int],
    sequence: TrainingSequence,
    advantage: float | None,
) -> GroupExample:
    """Return one rollout of a group; its advantage is repeated for each masked id."""
    repeated = None
    if advantage is not None:
        repeated = np.full(int(sequence.mask.sum()), advantage, dtype=np.float32)
    return GroupExample(
        rollout.prompt_id,
        rollout.sample,
        sequence,
        reward_of(rollout),
        repeated,
        sample_logprob(rollout, trained),
    )


def check_pair(pair: PairExample, vocabulary: int = 0) -> None:
    """Raise DataError, naming the row, unless both members are sound and share their prefix."""
    name = f"prompt {pair.prompt_id}, samples {pair.chosen.sample} and {pair.reject.sample}"
    chosen, reject = pair.chosen.sequence, pair.reject.sequence
    for side, member in (("chosen", pair.chosen), ("reject", pair.reject)):
        check_sequence(member.sequence, f"{name} ({side})", vocabulary)
        _check_numbers(member.sequence, member.sample_logprob, f"{name} ({side}_sample_logprob)")
    shared = pair.prefix_length
    if not 0 <= shared <= common_prefix(chosen.ids, reject.ids):
        raise DataError(f"{name}: their first {shared} ids are not the same")


def check_sequence(sequence: TrainingSequence, name: str, vocabulary: int = 0) -> None:
    """Raise DataError with the first promise that a sequence breaks. `vocabulary` 0: unknown."""
    if problem := next(_problems(sequence, vocabulary), None):
        raise DataError(f"{name}: {problem}")


def _problems(sequence: TrainingSequence, vocabulary: int) -> Iterator[str]:
    ids, mask = sequence.ids, sequence.mask
    if len(mask) != len(ids):
        yield f"the mask has {len(mask)} entries for {len(ids)} ids"
        return
    if not mask.any():
        yield "no id trains"
    elif mask[0]:
        yield "the first id trains, but nothing precedes it"
    sampled = np.zeros(len(ids), dtype=bool)
    end = 0
    for span in sequence.spans:
        if not end <= span.start <= span.end <= len(ids):
            yield f"the span of turn {span.turn}, {span.start} to {span.end}, is misplaced"
        sampled[span.start : span.end] = True
        end = span.end
    if (mask.astype(bool) & ~sampled).any():
        yield f"id {int(np.argmax(mask.astype(bool) & ~sampled))} trains but was not sampled"
    yield from _segment_problems(sequence)
    if len(ids) and (ids.min() < 0 or (vocabulary and ids.max() >= vocabulary)):
        yield f"ids from {ids.min()} to {ids.max()} in a vocabulary of {vocabulary or 'any size'}"


def _segment_problems(sequence: TrainingSequence) -> Iterator[str]:
    end = seen = 0
    for segment in sequence.segments:
        if segment.start != end or segment.length < 1:
            yield f"the segment at {segment.start} doesn't follow the one that ends at {end}"
        if not 0 <= segment.keep <= seen:
            yield f"the segment at {segment.start} keeps {segment.keep} of {seen} ids"
        end, seen = segment.start + segment.length, segment.keep + segment.length
    if end != len(sequence.ids):
        yield f"the segments cover {end} of {len(sequence.ids)} ids"


def _check_numbers(sequence: TrainingSequence, values: FloatArray | None, name: str) -> None:
    if values is None:
        return
    trained = int(sequence.mask.sum())
    if len(values) != trained or not np.isfinite(values).all():
        raise DataError(f"{name}: {len(values)} numbers, all finite, are needed for {trained} ids")
