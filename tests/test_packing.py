"""What is in a row, which rows share a pass, and how passes are dealt to ranks."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.packing import (
    Budget,
    Example,
    Strand,
    collate,
    plan_micro_batches,
    rows_of,
    widths,
)
from pipeline.records import Segment

CPU = torch.device("cpu")


def strand(ids: list[int], mask: str, segments: list[Segment] | None = None) -> Strand:
    bits = np.array([int(bit) for bit in mask], dtype=np.uint8)
    numbers = {"old_logprob": -np.arange(1, 1 + bits.sum(), dtype=np.float32)}
    cut = segments or [Segment(0, len(ids), 0)]
    return Strand(np.array(ids, dtype=np.int32), bits, cut, float(ids[0]), numbers)


def test_a_row_ends_before_its_last_target_and_names_source_and_target_of_each() -> None:
    #        10 11 [12 13] 14 [15] 16    trained ids in brackets
    example = Example("p", {"response": strand([10, 11, 12, 13, 14, 15, 16], "0011010")})

    (row,) = rows_of(example)

    assert row.ids.tolist() == [10, 11, 12, 13, 14]
    assert row.sources.tolist() == [1, 2, 4]
    assert row.targets.tolist() == [12, 13, 15]
    assert widths([example]) == [(1, 5)]


def test_segments_are_rows_with_the_context_that_the_policy_saw() -> None:
    # turn 0 sees 1 2, says 3 4; the template then drops 4: turn 1 sees 1 2 3 | 5 6, says 7
    segments = [Segment(0, 4, 0), Segment(4, 3, 3)]
    example = Example("p", {"response": strand([1, 2, 3, 4, 5, 6, 7], "0011001", segments)})

    first, second = rows_of(example)

    assert (first.ids.tolist(), first.sources.tolist()) == ([1, 2, 3], [1, 2])
    assert first.targets.tolist() == [3, 4]
    assert (second.ids.tolist(), second.sources.tolist()) == ([1, 2, 3, 5, 6], [4])
    assert second.targets.tolist() == [7]
    assert widths([example]) == [(2, 5)]


def test_a_segment_whose_first_id_trains_is_predicted_from_its_context() -> None:
    segments = [Segment(0, 2, 0), Segment(2, 2, 1)]
    example = Example("p", {"response": strand([1, 2, 3, 4], "0010", segments)})

    (row,) = rows_of(example)

    assert (row.ids.tolist(), row.sources.tolist(), row.targets.tolist()) == ([1], [0], [3])


def test_an_id_without_a_predecessor_cant_train() -> None:
    with pytest.raises(DataError, match="prompt p7: the first id"):
        rows_of(Example("p7", {"response": strand([1, 2], "10")}))


def test_collate_points_into_the_flattened_rows_and_keeps_members_apart() -> None:
    long = Example(
        "a", {"chosen": strand([5, 6, 7, 8, 9], "00011"), "reject": strand([6, 7, 8], "011")}
    )
    short = Example("b", {"chosen": strand([7, 8], "01"), "reject": strand([8, 9], "01")})

    batch = collate([long, short], CPU)

    assert batch.ids_BT.tolist() == [[5, 6, 7, 8], [6, 7, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0]]
    assert batch.sources_N.tolist() == [2, 3, 4, 5, 8, 12]
    assert batch.targets_N.tolist() == [8, 9, 7, 8, 8, 9]
    assert batch.owners_N.tolist() == [0, 0, 1, 1, 2, 3]
    assert {role: at.tolist() for role, at in batch.members.items()} == {
        "chosen": [0, 2],
        "reject": [1, 3],
    }
    assert batch.rewards_M.tolist() == [5, 6, 7, 8]
    assert batch.numbers_N["old_logprob"].tolist() == [-1, -2, -1, -2, -1, -1]
    assert batch.prompt_ids == ["a", "b"]
    assert batch.tokens == 8


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
