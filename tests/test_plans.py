"""Plans: the distribution of the branch turn and of the score turn."""

from collections import Counter

import pytest

from pipeline.errors import DataError
from pipeline.plans import PLANS, Plan, plan_for

DRAWS = 20_000


def shares(name: str, of: str) -> list[float]:
    plans = [plan_for(name, 0, f"p{n}", 5, 4) for n in range(DRAWS)]
    counts = Counter(getattr(plan, of) for plan in plans)
    return [counts[turn] / DRAWS for turn in range(5)]


def test_refuel_forks_as_setting_one_does():
    # P(h) = sum over L >= h of 1/5 x 1/(L+1); the seed's numbers for H = 5.
    assert shares("refuel", "branch_turn") == pytest.approx(
        [0.4567, 0.2567, 0.1567, 0.09, 0.04], abs=0.012
    )
    assert shares("refuel", "score_turn") == pytest.approx([0.2] * 5, abs=0.012)


def test_refuel_uniform_forks_uniformly_and_plays_to_the_end():
    assert shares("refuel_uniform", "branch_turn") == pytest.approx([0.2] * 5, abs=0.012)
    assert shares("refuel_uniform", "score_turn") == [0, 0, 0, 0, 1]


def test_fork_geometric_is_truncated_and_renormalised():
    assert shares("fork_geometric", "branch_turn") == pytest.approx(
        [0.361, 0.252, 0.177, 0.124, 0.087], abs=0.012
    )


def test_independent_shares_only_the_prompt():
    assert plan_for("independent", 0, "p", 5, 4) == Plan(4, None, 4)


@pytest.mark.parametrize("name", PLANS)
def test_a_fork_never_comes_after_its_score_turn(name):
    for n in range(500):
        plan = plan_for(name, 3, f"p{n}", 5, 3)
        assert 0 <= (plan.branch_turn or 0) <= plan.score_turn <= 4
        assert plan == plan_for(name, 3, f"p{n}", 5, 3)


def test_one_turn_leaves_no_choice():
    for name in PLANS:
        plan = plan_for(name, 0, "p", 1, 2)
        assert (plan.branch_turn or 0, plan.score_turn) == (0, 0)


def test_unknown_plan_names_the_known():
    with pytest.raises(DataError, match="refuel_uniform"):
        plan_for("refule", 0, "p", 5, 2)
