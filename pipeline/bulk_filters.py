"""The filters of filters.py for a batch at once: arrays of rollouts or pairs -> which are wrong."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.bulk_sequences import Sequences, trained_ids
from pipeline.ragged import Bools, Ints, bounds_of, owners, ranges, sums
from pipeline.rollout_arrays import Rollouts

Marked: TypeAlias = tuple[str, Bools]
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
        | (sums(said.role_M < 0, said.bounds) > 0)
        | (sums(badly_placed, said.policy_bounds) > 0)
        | (~rollouts.text & (rollouts.num_spoken != rollouts.num_turns))
        | (rollouts.score_turn < 0)
        | (rollouts.score_turn >= rollouts.num_spoken)
        | (rollouts.branch_turn < 0)
        | (sums(~adds_up_T, turns.bounds) > 0)
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
    return sums(cut, sequences.bounds) > 0


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
    left: npt.NDArray[Any],
    left_bounds: Ints,
    right: npt.NDArray[Any],
    right_bounds: Ints,
    lengths: Ints,
) -> Bools:
    """Mark pairs of lists whose first `lengths` values aren't there, or not the same."""
    short = np.minimum(np.diff(left_bounds), np.diff(right_bounds)) < lengths
    lengths = np.where(short, 0, lengths)
    differs = left[ranges(left_bounds[:-1], lengths)] != right[ranges(right_bounds[:-1], lengths)]
    wrong = short.copy()
    wrong[owners(bounds_of(lengths))[differs]] = True
    return wrong


def same_response(left: Sequences, right: Sequences) -> Bools:
    """Mark pairs whose trained ids are the same."""
    counts = left.trained
    alike = counts == right.trained
    ids, bounds = zip(*((trained_ids(s), bounds_of(s.trained)) for s in (left, right)), strict=True)
    lengths = np.where(alike, counts, 0)
    return alike & ~unlike(ids[0], bounds[0], ids[1], bounds[1], lengths)
