"""Compare policies by their scores at each turn, on the same prompts. numpy only.

The unit is a prompt: rollouts of one prompt are averaged first, because they are not independent.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.records import NO_SCORE

Z95 = 1.959963984540054
"""The 97.5% point of the normal distribution: half-width of a 95% interval in standard errors."""

Scores = Mapping[str, npt.NDArray[np.float64]]
"""prompt_id -> score at each turn, NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the half-width of its 95% interval (NaN for fewer than two prompts)."""

    mean: float
    half_width: float
    prompts: int


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """One turn: the policy's score, and its win-rate against the baseline (ties count half)."""

    turn: int
    score: Estimate
    win_rate: Estimate


def estimate(values: npt.NDArray[np.float64]) -> Estimate:
    """Return the mean with its normal 95% interval; NaN values are left out.

    Worked by hand: 0, 1, 1, 0 has mean .5, sd sqrt(1/3), half-width 1.96 x .5774 / 2 = .5658.
    """
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    half_width = Z95 * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), float(half_width), n)


def scores_by_prompt(
    rows: Iterable[tuple[str, Sequence[float | None] | None]], num_turns: int
) -> Scores:
    """Average the rewards of each prompt's rollouts, turn by turn.

    A dialogue that ended before a turn has no score there; neither has an unscored turn.
    """
    stacks: dict[str, list[npt.NDArray[np.float64]]] = {}
    for prompt_id, rewards in rows:
        values = np.full(num_turns, np.nan)
        for turn, reward in enumerate((rewards or [])[:num_turns]):
            if reward is not None and reward != NO_SCORE:
                values[turn] = reward
        stacks.setdefault(prompt_id, []).append(values)
    return {prompt_id: _mean(np.stack(stack)) for prompt_id, stack in stacks.items()}


def _mean(values_ST: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Not nanmean: it warns where a turn has no score at all, which is no accident here.
    counts_T = (~np.isnan(values_ST)).sum(axis=0)
    sums_T = np.nansum(values_ST, axis=0)
    return np.where(counts_T > 0, sums_T / np.maximum(counts_T, 1), np.nan)


def compare(policy: Scores, baseline: Scores, num_turns: int) -> list[TurnComparison]:
    """Return the policy's score and win-rate at each turn, over the prompts that both have."""
    shared = sorted(policy.keys() & baseline.keys())
    if not shared:
        return []
    policy_PT = np.stack([policy[prompt_id] for prompt_id in shared])
    baseline_PT = np.stack([baseline[prompt_id] for prompt_id in shared])
    gap_PT = policy_PT - baseline_PT
    wins_PT = np.where(np.isnan(gap_PT), np.nan, (np.sign(gap_PT) + 1) / 2)
    return [
        TurnComparison(turn, estimate(policy_PT[:, turn]), estimate(wins_PT[:, turn]))
        for turn in range(num_turns)
    ]


def gained(first: Estimate, last: Estimate) -> bool:
    """Whether the last score is above the first by more than both half-widths together."""
    return last.mean - last.half_width > first.mean + first.half_width
