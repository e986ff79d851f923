"""Which rollouts a prompt gets: how many, where they fork, where they stop. Pure and seeded.

Turns are policy turns, counted from 0. H is the number of turns of a full dialogue, L the score
turn, h the branch turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.seeds import generator_for

GEOMETRIC_P = 0.3
"""P(h) of `fork_geometric` is p(1-p)^h, cut at H and renormalised (multiturn_llm_training)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The rollouts of one prompt: `samples` of them that part at `branch_turn` (h).

    `branch_turn` None: they share only the prompt. All stop after `score_turn` (L).
    """

    samples: int
    branch_turn: int | None
    score_turn: int


def refuel(draw: np.random.Generator, num_turns: int, group_size: int) -> Plan:
    """REFUEL setting one: L ~ U{0..H-1}, h ~ U{0..L}."""
    score_turn = int(draw.integers(num_turns))
    return Plan(2, int(draw.integers(score_turn + 1)), score_turn)


def refuel_uniform(draw: np.random.Generator, num_turns: int, group_size: int) -> Plan:
    """REFUEL setting two: h ~ U{0..H-1}; both rollouts play to the end."""
    return Plan(2, int(draw.integers(num_turns)), num_turns - 1)


def independent(draw: np.random.Generator, num_turns: int, group_size: int) -> Plan:
    """DPO and GRPO: G full rollouts that share only the prompt."""
    return Plan(group_size, None, num_turns - 1)


def fork_geometric(draw: np.random.Generator, num_turns: int, group_size: int) -> Plan:
    """LA-GRPO: h from a truncated geometric(0.3); G rollouts share one prefix up to turn h."""
    weights = (1 - GEOMETRIC_P) ** np.arange(num_turns)
    branch_turn = int(draw.choice(num_turns, p=weights / weights.sum()))
    return Plan(group_size, branch_turn, num_turns - 1)


PLANS: dict[str, Callable[[np.random.Generator, int, int], Plan]] = {
    "refuel": refuel,
    "refuel_uniform": refuel_uniform,
    "independent": independent,
    "fork_geometric": fork_geometric,
}


def plan_for(name: str, run_seed: int, prompt_id: str, num_turns: int, group_size: int) -> Plan:
    """Draw the plan of a prompt; the same arguments give the same plan."""
    if name not in PLANS:
        raise DataError(f"no plan is named {name!r}; there are {', '.join(PLANS)}")
    return PLANS[name](generator_for(run_seed, prompt_id, 0, 0, "plan"), num_turns, group_size)
