"""The rollouts of a prompt -> a pair or a group, and a reason for each rollout that isn't used."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline import filters
from pipeline.advantages import ADVANTAGES
from pipeline.errors import RowError
from pipeline.examples import (
    Encoder,
    best_and_worst,
    group_of,
    member_of,
    pair_of,
    sequence_of,
    trained_turns,
)
from pipeline.records import GroupExample, PairExample, Rollout, TrainingSequence

Dropped: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rules:
    """What trains (`mask`), what is too much, and what a group's advantages are.

    `encoder` gives the chat template for text without ids; it is asked for only when there is some.
    `ahead` is told of rollouts without ids before they are selected, to encode them at once.
    `compat` names whose rules decide instead of ours: compat.COMPATS.
    """

    mask: str
    max_length: int
    encoder: Callable[[], Encoder]
    advantages: str = "none"
    drop_truncated: bool = False
    keep_ties: bool = False
    ahead: Callable[[Sequence[Rollout]], None] = lambda rollouts: None
    compat: str = "none"


@dataclass(frozen=True, slots=True)
class Usable:
    """A rollout that can train, its trained turns and its ids."""

    rollout: Rollout
    trained: list[int]
    sequence: TrainingSequence


def select_pairs(
    rollouts: Sequence[Rollout], rules: Rules
) -> tuple[list[PairExample], list[Dropped]]:
    """Pair the best rollout of a prompt with the worst; of REFUEL's two, the only pair there is."""
    usable, dropped = _sift(rollouts, rules, needs_reward=True)
    if len(usable) < 2:
        return [], dropped + _alone(usable, dropped)
    members = [member_of(one.rollout, one.trained, one.sequence) for one in usable]
    best, worst = best_and_worst([member.reward for member in members])
    between = [one for i, one in enumerate(usable) if i not in (best, worst)]
    dropped += [_drop(one.rollout, filters.NOT_EXTREME) for one in between]
    chosen, reject = members[best], members[worst]
    pair = pair_of(usable[best].rollout, chosen, reject)
    reason = (
        filters.different_prefix(chosen, reject, pair.prefix_length)
        or filters.same_response(chosen, reject)
        or (None if rules.keep_ties else filters.tie(chosen, reject))
    )
    if reason is None:
        return [pair], dropped
    return [], dropped + [_drop(usable[i].rollout, reason) for i in sorted((best, worst))]


def select_group(
    rollouts: Sequence[Rollout], rules: Rules
) -> tuple[list[GroupExample], list[Dropped]]:
    """Keep every usable rollout of a prompt, with its advantage over the others if one is asked."""
    compare = ADVANTAGES[rules.advantages]
    usable, dropped = _sift(rollouts, rules, needs_reward=compare is not None)
    if compare is None:
        return [group_of(one.rollout, one.trained, one.sequence, None) for one in usable], dropped
    if len(usable) < 2:
        return [], dropped + _alone(usable, dropped)
    rewards = [filters.reward_of(one.rollout) for one in usable]
    advantages = compare([reward for reward in rewards if reward is not None])
    return [
        group_of(one.rollout, one.trained, one.sequence, float(advantage))
        for one, advantage in zip(usable, advantages, strict=True)
    ], dropped


def _sift(
    rollouts: Sequence[Rollout], rules: Rules, needs_reward: bool
) -> tuple[list[Usable], list[Dropped]]:
    usable, dropped = list[Usable](), list[Dropped]()
    for rollout in sorted(rollouts, key=lambda rollout: rollout.sample):
        try:
            usable.append(_usable(rollout, rules, needs_reward))
        except RowError as error:
            dropped.append(_drop(rollout, error.reason, error.detail))
    return usable, dropped


def _usable(rollout: Rollout, rules: Rules, needs_reward: bool) -> Usable:
    """Tokenize a rollout. Raises RowError with the first reason against it."""
    if reason := filters.rollout_reason(rollout, needs_reward):
        raise RowError(reason, _detail(rollout, reason))
    trained = trained_turns(rollout, rules.mask)
    if rules.drop_truncated and (reason := filters.truncated(rollout, trained)):
        raise RowError(reason)
    encoder = rules.encoder() if rollout.turns is None else None
    sequence = sequence_of(rollout, trained, encoder)
    if reason := filters.empty_response(sequence):
        raise RowError(reason)
    if reason := filters.too_long(sequence, rules.max_length):
        raise RowError(reason, f"{len(sequence.ids)} ids")
    return Usable(rollout, trained, sequence)


def _detail(rollout: Rollout, reason: str) -> str:
    errors = rollout.reward_errors
    if reason == "no_reward" and errors and rollout.score_turn < len(errors):
        return errors[rollout.score_turn] or ""
    return rollout.end_reason if reason in ("failed", "ended_before_fork") else ""


def _alone(usable: Sequence[Usable], dropped: Sequence[Dropped]) -> list[Dropped]:
    lost = told_of((row["sample"], row["reason"]) for row in dropped)
    return [_drop(one.rollout, filters.MISSING_SIBLING, lost) for one in usable]


def told_of(lost: Iterable[tuple[int, str]]) -> str:
    """Say what happened to the siblings of a rollout that is alone."""
    return ", ".join(f"sample {sample}: {reason}" for sample, reason in lost)


def _drop(rollout: Rollout, reason: str, detail: str = "") -> Dropped:
    return drop(rollout.prompt_id, rollout.sample, reason, detail)


def drop(prompt_id: str, sample: int, reason: str, detail: str = "") -> Dropped:
    """Return the row of dropped.jsonl for a rollout."""
    row = {"prompt_id": prompt_id, "sample": sample, "reason": reason}
    return row | {"detail": detail} if detail else row
