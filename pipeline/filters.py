"""Filters: what is wrong with a rollout or a pair -> reason | None. The first reason counts."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.records import NO_SCORE, Member, Rollout, TrainingSequence

_ROLES = frozenset({"system", "user", "assistant", "tool"})

MISSING_SIBLING = "missing_sibling"
NOT_EXTREME = "neither_best_nor_worst"


def policy_messages(rollout: Rollout) -> list[int]:
    """Return where the policy's turns are among the messages.

    The opening may hold assistant messages of a dataset; those of the policy are the last ones.
    """
    roles = [message.get("role") for message in rollout.messages]
    spoken = [i for i, role in enumerate(roles) if role == "assistant"]
    return spoken if rollout.turns is None else spoken[max(len(spoken) - len(rollout.turns), 0) :]


def failed(rollout: Rollout) -> str | None:
    """Name a rollout that generate could not play."""
    return "failed" if rollout.status == "failed" else None


def not_a_dialogue(rollout: Rollout) -> str | None:
    """Name a rollout with unknown roles, two policy turns in a row, or turns that don't add up."""
    spoken = policy_messages(rollout)
    roles = [message.get("role") for message in rollout.messages]
    sound = (
        set(roles) <= _ROLES
        and all(i > 0 and roles[i - 1] != "assistant" for i in spoken)
        and (rollout.turns is None or len(spoken) == len(rollout.turns))
        and 0 <= rollout.score_turn < max(len(spoken), 1)
        and (rollout.branch_turn or 0) >= 0
        and _adds_up(rollout)
    )
    return None if sound and spoken else "not_a_dialogue"


def _adds_up(rollout: Rollout) -> bool:
    length = 0
    for turn in rollout.turns or []:
        if not 0 <= turn.keep <= length:
            return False
        if turn.logprobs is not None and len(turn.logprobs) != len(turn.response_ids):
            return False
        length = turn.keep + len(turn.prompt_ids) + len(turn.response_ids)
    return True


def ended_before_fork(rollout: Rollout) -> str | None:
    """Name a rollout that never reached the turn at which its group parts."""
    # The score turn is the last one played, or before it.
    late = rollout.branch_turn is not None and rollout.branch_turn > rollout.score_turn
    return "ended_before_fork" if late else None


def reward_of(rollout: Rollout) -> float | None:
    """Return the reward that trains: the score at the score turn, None where there is none."""
    if rollout.rewards is None or rollout.score_turn >= len(rollout.rewards):
        return None
    reward = rollout.rewards[rollout.score_turn]
    return None if reward is None or reward == NO_SCORE or not math.isfinite(reward) else reward


def no_reward(rollout: Rollout) -> str | None:
    """Name a rollout without a score at its score turn; other turns may lack theirs."""
    return "no_reward" if reward_of(rollout) is None else None


def truncated(rollout: Rollout, trained: Sequence[int]) -> str | None:
    """Name a rollout of which a trained turn was cut by the length limit."""
    cut = rollout.turns and any(rollout.turns[t].finish_reason == "length" for t in trained)
    return "truncated" if cut else None


def empty_response(sequence: TrainingSequence) -> str | None:
    """Name a sequence in which nothing trains."""
    return None if sequence.mask.any() else "empty_response"


def too_long(sequence: TrainingSequence, max_length: int) -> str | None:
    """Name a sequence of more ids than the limit, each id that is trained or read counted once."""
    return "too_long" if len(sequence.ids) > max_length else None


def rollout_reason(rollout: Rollout, needs_reward: bool) -> str | None:
    """Return the first reason against a rollout, before it is tokenized."""
    return (
        failed(rollout)
        or not_a_dialogue(rollout)
        or ended_before_fork(rollout)
        or (no_reward(rollout) if needs_reward else None)
    )


def different_prefix(left: Member, right: Member, prefix_length: int) -> str | None:
    """Name two members that should share the context of their fork and don't."""
    a, b = left.sequence, right.sequence
    same = np.array_equal(a.ids[:prefix_length], b.ids[:prefix_length]) and np.array_equal(
        a.mask[:prefix_length], b.mask[:prefix_length]
    )
    return None if same else "different_prefix"


def same_response(left: Member, right: Member) -> str | None:
    """Name two members whose trained ids are the same: there is nothing to prefer."""
    a, b = (member.sequence.ids[member.sequence.mask == 1] for member in (left, right))
    return "same_response" if np.array_equal(a, b) else None


def tie(left: Member, right: Member) -> str | None:
    """Name two members with equal rewards."""
    return "tie" if left.reward == right.reward else None
