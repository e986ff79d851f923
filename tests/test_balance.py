"""Which examples share a pass, and how passes are dealt to ranks."""

import numpy as np
import pytest

from pipeline.balance import Budget, plan_micro_batches, sizes_of
from tests.test_packing import pair_of


def test_sizes_count_padding_where_there_is_some() -> None:
    #  1 2 3 [4 5 6]  and  1 2 3 [7]: rows of 5 and 3 ids; joined, 5 and none of its own
    pair = pair_of([1, 2, 3, 4, 5, 6], "000111", [1, 2, 3, 7], "0001")
    assert sizes_of([pair], "apart") == [(2, 5)]
    assert sizes_of([pair], "dense") == [(1, 5)]
    assert sizes_of([pair], "chains") == [(1, 5)]


def test_a_flat_budget_counts_ids_and_a_padded_one_places() -> None:
    sizes = [(1, 10), (1, 2), (1, 2)]
    assert Budget(14, layout="chains").holds(sizes)
    assert not Budget(29).holds(sizes)
    assert Budget(30).holds(sizes)
    assert not Budget(30, examples=2).holds(sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_every_example_is_dealt_once_and_ranks_get_equally_many_like_sized_passes(
    world: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = [(2, int(width)) for width in rng.integers(1, 90, rng.integers(1, 60))]

    ranks = plan_micro_batches(sizes, Budget(256), world)

    assert len(ranks) == world
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [i for batches in ranks for batch in batches for i in batch]
    assert sorted(dealt) == list(range(len(sizes)))
    for batches in ranks:
        for batch in batches:
            padded = 2 * len(batch) * max((sizes[i][1] for i in batch), default=0)
            assert padded <= 256
    # Before it runs dry a rank never gets an empty pass while another has several examples.
    if len(sizes) >= world * len(ranks[0]):
        assert all(batch for batches in ranks for batch in batches)


def test_ranks_carry_balanced_loads() -> None:
    sizes = [(2, width) for width in np.random.default_rng(0).integers(20, 400, 256)]

    ranks = plan_micro_batches(sizes, Budget(4096), 8)

    loads = [sum(2 * sizes[i][1] for batch in rank for i in batch) for rank in ranks]
    assert max(loads) < 1.1 * min(loads)


def test_an_example_beyond_the_budget_has_a_pass_to_itself() -> None:
    assert plan_micro_batches([(2, 10), (2, 500), (2, 10)], Budget(64), 1) == [[[1], [0, 2]]]


def test_a_budget_can_bound_the_examples() -> None:
    assert plan_micro_batches([(1, 5)] * 3, Budget(1000, examples=2), 1) == [[[0, 1], [2]]]


def test_ranks_without_an_example_get_an_empty_pass() -> None:
    assert plan_micro_batches([(2, 5)], Budget(64), 3) == [[[0]], [[]], [[]]]
