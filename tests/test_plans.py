"""Plans: the distribution of the branch turn and of the score turn, exactly and as drawn."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.plans import PLANS, Plan, plan_for
from pipeline.seeds import seed_for

DRAWS = 20_000
H = 5


class Chooses:
    """Stands in for a generator: takes the given choices, and keeps how probable they are."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.left = list(choices)
        self.probability = Fraction(1)

    def integers(self, count: int) -> int:
        return self._take([Fraction(1, count)] * count)

    def choice(self, count: int, p: Sequence[float]) -> int:
        assert len(p) == count
        return self._take([Fraction(float(share)) for share in p])

    def _take(self, shares: Sequence[Fraction]) -> int:
        taken = self.left.pop(0)
        self.probability *= shares[taken] if taken < len(shares) else 0
        return taken


def outcomes(name: str, turns: int = H) -> dict[tuple[int, int], Fraction]:
    """Return the probability of each (score turn, branch turn), from all choices there are."""
    found: Counter[tuple[int, int]] = Counter()
    for choices in product(range(turns), repeat=2):
        draw: Any = Chooses(choices)
        plan = PLANS[name](draw, turns, 4)
        # A plan that makes fewer choices is met once for each of those that it leaves.
        share = draw.probability / turns ** len(draw.left)
        found[plan.score_turn, plan.branch_turn or 0] += share
    return {key: share for key, share in found.items() if share}


def marginal(shares: dict[tuple[int, int], Fraction], axis: int) -> list[Fraction]:
    turns = max(key[axis] for key in shares) + 1
    return [sum((s for k, s in shares.items() if k[axis] == t), Fraction(0)) for t in range(turns)]


@cache
def drawn(name: str, run_seed: int = 0) -> list[Plan]:
    return [plan_for(name, run_seed, f"p{n}", H, 4) for n in range(DRAWS)]


def assert_drawn_from(counts: Counter[Any], shares: dict[Any, float]) -> None:
    """Each count is within 4.5 standard deviations of what its share lets expect."""
    assert set(counts) <= set(shares)
    for key, share in shares.items():
        off = abs(counts[key] - DRAWS * share)
        assert off <= 4.5 * (DRAWS * share * (1 - share)) ** 0.5, key


@pytest.mark.parametrize("turns", [1, 2, 5, 8])
def test_refuel_is_setting_one(turns: int) -> None:
    # L ~ U{0..H-1}, then h ~ U{0..L}
    expected = {(L, h): Fraction(1, turns * (L + 1)) for L in range(turns) for h in range(L + 1)}
    assert outcomes("refuel", turns) == expected


def test_refuel_forks_early_as_the_seeds_numbers_say() -> None:
    assert marginal(outcomes("refuel"), 0) == [Fraction(1, 5)] * 5
    forks = [float(share) for share in marginal(outcomes("refuel"), 1)]
    assert [round(share, 3) for share in forks] == [0.457, 0.257, 0.157, 0.09, 0.04]


def test_refuel_uniform_forks_uniformly_and_plays_to_the_end() -> None:
    assert outcomes("refuel_uniform") == {(4, h): Fraction(1, 5) for h in range(5)}


@pytest.mark.parametrize("turns", [1, 2, 5, 8])
def test_fork_geometric_is_truncated_and_renormalised(turns: int) -> None:
    found = outcomes("fork_geometric", turns)
    assert set(found) == {(turns - 1, h) for h in range(turns)}
    for (_, h), share in found.items():
        assert float(share) == pytest.approx(0.3 * 0.7**h / (1 - 0.7**turns), abs=1e-15)


def test_fork_geometric_has_the_seeds_numbers() -> None:
    forks = [float(share) for share in marginal(outcomes("fork_geometric"), 1)]
    assert [round(share, 3) for share in forks] == [0.361, 0.252, 0.177, 0.124, 0.087]


def test_independent_shares_only_the_prompt() -> None:
    assert plan_for("independent", 0, "p", 5, 4) == Plan(4, None, 4)
    assert outcomes("independent") == {(4, 0): Fraction(1)}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_drawn_has_the_exact_joint_distribution(name: str) -> None:
    counts = Counter((plan.score_turn, plan.branch_turn or 0) for plan in drawn(name))
    assert_drawn_from(counts, {key: float(share) for key, share in outcomes(name).items()})


@pytest.mark.parametrize("name", ["refuel", "refuel_uniform", "fork_geometric"])
@pytest.mark.parametrize(
    "other",
    [
        lambda n: seed_for(0, f"p{n}", 0, 0, "policy") % 4,
        lambda n: seed_for(0, f"p{n}", 1, 0, "policy") % 4,
        lambda n: seed_for(0, f"p{n}", 0, 1, "user-0") % 4,
        lambda n: n % 4,
    ],
    ids=["policy", "sibling", "user", "place"],
)
def test_a_plan_tells_nothing_of_the_runs_other_seeds(
    name: str, other: Callable[[int], int]
) -> None:
    plans = drawn(name)
    forks = [float(share) for share in marginal(outcomes(name), 1)]
    counts = Counter((plan.branch_turn, other(n)) for n, plan in enumerate(plans))
    assert_drawn_from(counts, {(h, k): forks[h] / 4 for h in range(H) for k in range(4)})


@pytest.mark.parametrize("name", ["refuel", "refuel_uniform", "fork_geometric"])
def test_another_run_draws_anew(name: str) -> None:
    forks = [float(share) for share in marginal(outcomes(name), 1)]
    runs = zip(drawn(name, 0), drawn(name, 1), strict=True)
    counts = Counter((one.branch_turn, other.branch_turn) for one, other in runs)
    shares = {(a, b): forks[a] * forks[b] for a in range(H) for b in range(H)}
    assert_drawn_from(counts, shares)


@pytest.mark.parametrize("name", PLANS)
def test_a_prompts_plan_depends_on_no_other_and_on_no_order(name: str) -> None:
    prompts = [f"p{n}" for n in range(200)]
    first = {prompt: plan_for(name, 3, prompt, H, 3) for prompt in prompts}
    shuffled = random.Random(0).sample(prompts, 50)
    assert {prompt: plan_for(name, 3, prompt, H, 3) for prompt in shuffled} == {
        prompt: first[prompt] for prompt in shuffled
    }


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_neither_reads_nor_moves_a_global_generator(name: str) -> None:
    expected = plan_for(name, 0, "p", H, 3)
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002 - the generator that nobody may touch
        before = np.random.get_state()[1].tolist()  # noqa: NPY002
        assert plan_for(name, 0, "p", H, 3) == expected
        assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize("name", PLANS)
def test_a_fork_never_comes_after_its_score_turn(name: str) -> None:
    for n in range(500):
        plan = plan_for(name, 3, f"p{n}", 5, 3)
        assert 0 <= (plan.branch_turn or 0) <= plan.score_turn <= 4
        assert plan.samples == (2 if name.startswith("refuel") else 3)


def test_one_turn_leaves_no_choice() -> None:
    for name in PLANS:
        plan = plan_for(name, 0, "p", 1, 2)
        assert (plan.branch_turn or 0, plan.score_turn) == (0, 0)


def test_unknown_plan_names_the_known() -> None:
    with pytest.raises(DataError, match="refuel_uniform"):
        plan_for("refule", 0, "p", 5, 2)
