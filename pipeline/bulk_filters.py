"""The filters of filters.py for a batch at once: arrays of rollouts or pairs -> which are wrong."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.bulk_sequences import Sequences, trained_ids
from pipeline.ragged import Bools, Ints, anywhere, bounds_of, ranges
from pipeline.rollout_arrays import Rollouts

Marked: TypeAlias = tuple[str, Bools]
Values: TypeAlias = npt.NDArray[Any]
Names: TypeAlias = npt.NDArray[np.object_]


def failed(rollouts: Rollouts) -> Bools:
    """Mark rollouts that generate could not play."""
    return rollouts.failed


def not_a_dialogue(rollouts: Rollouts) -> Bools:
    """Mark unknown roles, two policy turns in a row, and turns that don't add up."""
    said, turns = rollouts.messages, rollouts.turns
    first = np.zeros(len(said.role_M), dtype=bool)
    first[said.bounds[:-1][np.diff(said.bounds) > 0]] = True
    after_itself = np.zeros(len(said.role_M), dtype=bool)
    after_itself[1:] = said.assistant_M[:-1]
    badly_placed = (first | after_itself)[said.policy]
    adds_up_T = (turns.keep_T >= 0) & (turns.keep_T <= turns.seen_T) & ~turns.missing_T
    adds_up_T &= ~turns.has_logprobs_T | (np.diff(turns.logprobs) == np.diff(turns.responses))
    return (
        (rollouts.num_spoken == 0)
        | anywhere(said.role_M < 0, said.bounds)
        | anywhere(badly_placed, said.policy_bounds)
        | (~rollouts.text & (rollouts.num_spoken != rollouts.num_turns))
        | (rollouts.score_turn < 0)
        | (rollouts.score_turn >= rollouts.num_spoken)
        | (rollouts.branch_turn < 0)
        | anywhere(~adds_up_T, turns.bounds)
    )


def ended_before_fork(rollouts: Rollouts) -> Bools:
    """Mark rollouts that never reached the turn at which their group parts."""
    return rollouts.has_fork & (rollouts.branch_turn > rollouts.score_turn)


def no_reward(rollouts: Rollouts) -> Bools:
    """Mark rollouts without a score at their score turn; other turns may lack theirs."""
    return np.isnan(rollouts.reward)


def before(rollouts: Rollouts, needs_reward: bool) -> list[Marked]:
    """Return the filters that every rollout passes before it is tokenized, in their order."""
    marked = [
        ("failed", failed(rollouts)),
        ("not_a_dialogue", not_a_dialogue(rollouts)),
        ("ended_before_fork", ended_before_fork(rollouts)),
    ]
    return [*marked, ("no_reward", no_reward(rollouts))] if needs_reward else marked


def first_reasons(marked: Sequence[Marked]) -> Names:
    """Return for each row the first filter that marks it, or None."""
    reasons = np.full(len(marked[0][1]), None, dtype=object)
    for name, marks in reversed(marked):
        reasons[marks] = name
    return reasons


def truncated(sequences: Sequences) -> Bools:
    """Mark sequences of which a trained turn was cut by the length limit."""
    cut = sequences.trained_P & sequences.rollouts.turns.cut_T[sequences.turn_P]
    return anywhere(cut, sequences.bounds)


def empty_response(sequences: Sequences) -> Bools:
    """Mark sequences in which nothing trains."""
    return sequences.trained == 0


def too_long(sequences: Sequences, max_length: int) -> Bools:
    """Mark sequences of more ids than the limit."""
    return sequences.lengths > max_length


def tie(left: Sequences, right: Sequences) -> Bools:
    """Mark pairs with equal rewards."""
    return left.rollouts.reward[left.rows] == right.rollouts.reward[right.rows]


def unlike(
    left: Sequence[Values],
    left_bounds: Ints,
    right: Sequence[Values],
    right_bounds: Ints,
    lengths: Ints,
) -> Bools:
    """Mark pairs of lists whose first `lengths` values aren't there, or not the same.

    Several arrays of the same bounds (ids and masks) are compared at once.
    """
    short = np.minimum(np.diff(left_bounds), np.diff(right_bounds)) < lengths
    lengths = np.where(short, 0, lengths)
    of_left, of_right = (ranges(b[:-1], lengths) for b in (left_bounds, right_bounds))
    wrong = short
    for a, b in zip(left, right, strict=True):
        wrong = wrong | anywhere(a[of_left] != b[of_right], bounds_of(lengths))
    return wrong


def same_response(left: Sequences, right: Sequences) -> Bools:
    """Mark pairs whose trained ids are the same."""
    counts = left.trained
    alike = counts == right.trained
    ids, bounds = zip(*((trained_ids(s), bounds_of(s.trained)) for s in (left, right)), strict=True)
    lengths = np.where(alike, counts, 0)
    return alike & ~unlike(ids[:1], bounds[0], ids[1:], bounds[1], lengths)
