"""What is in a row: branches, where each trained id is predicted from, and what shares a place."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.microbatches import collate
from pipeline.packing import Branch, Example, Row, Strand, arrange, longest_context, member_rows
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

    (row,) = member_rows(example)

    assert row.ids.tolist() == [10, 11, 12, 13, 14]
    assert row.sources.tolist() == [1, 2, 4]
    assert row.targets.tolist() == [12, 13, 15]
    assert longest_context(example) == 5


def test_segments_are_rows_with_the_context_that_the_policy_saw() -> None:
    # turn 0 sees 1 2, says 3 4; the template then drops 4: turn 1 sees 1 2 3 | 5 6, says 7
    segments = [Segment(0, 4, 0), Segment(4, 3, 3)]
    example = Example("p", {"response": strand([1, 2, 3, 4, 5, 6, 7], "0011001", segments)})

    first, second = member_rows(example)

    assert (first.ids.tolist(), first.sources.tolist()) == ([1, 2, 3], [1, 2])
    assert first.targets.tolist() == [3, 4]
    assert (second.ids.tolist(), second.sources.tolist()) == ([1, 2, 3, 5, 6], [4])
    assert second.targets.tolist() == [7]
    assert longest_context(example) == 5


def test_a_segment_whose_first_id_trains_is_predicted_from_its_context() -> None:
    segments = [Segment(0, 2, 0), Segment(2, 2, 1)]
    example = Example("p", {"response": strand([1, 2, 3, 4], "0010", segments)})

    (row,) = member_rows(example)

    assert (row.ids.tolist(), row.sources.tolist(), row.targets.tolist()) == ([1], [0], [3])


def test_an_id_without_a_predecessor_cant_train() -> None:
    with pytest.raises(DataError, match="prompt p7: the first id"):
        member_rows(Example("p7", {"response": strand([1, 2], "10")}))


def pair_of(left: list[int], left_mask: str, right: list[int], right_mask: str) -> Example:
    return Example("p", {"chosen": strand(left, left_mask), "reject": strand(right, right_mask)})


def grown(example: Example) -> Row:
    (row,) = arrange(example, "chains")
    return row


def test_members_are_branches_after_their_common_ids() -> None:
    #         1 2 3 [4 5]  and  1 2 3 [6 7] : b's first id is predicted from the prefix's last
    row = grown(pair_of([1, 2, 3, 4, 5], "00011", [1, 2, 3, 6, 7], "00011"))

    assert row.ids.tolist() == [1, 2, 3, 4, 6]  # the last ids of a and b are targets only
    assert row.branches == (Branch(0, 4), Branch(4, 5, ((0, 3),)))
    assert row.positions.tolist() == [0, 1, 2, 3, 3]
    assert row.sources.tolist() == [2, 3, 2, 4]
    assert row.targets.tolist() == [4, 5, 6, 7]
    assert row.owners.tolist() == [0, 0, 1, 1]


def test_a_member_that_is_the_beginning_of_another_takes_no_place() -> None:
    row = grown(pair_of([1, 2, 3, 4, 5], "00011", [1, 2, 3, 9], "0001"))

    assert row.branches == (Branch(0, 4),)
    assert row.sources.tolist() == [2, 3, 2]
    assert row.targets.tolist() == [4, 5, 9]


def test_branches_fork_from_branches() -> None:
    # a: 1 2 3 4 5 [6]   b: 1 2 3 7 8 [9]   c: 1 2 3 7 8 5 [4], which parts from b after 8
    members = {
        "a": strand([1, 2, 3, 4, 5, 6], "000001"),
        "b": strand([1, 2, 3, 7, 8, 9], "000001"),
        "c": strand([1, 2, 3, 7, 8, 5, 4], "0000001"),
    }
    row = grown(Example("g", members))

    assert row.ids.tolist() == [1, 2, 3, 4, 5, 7, 8, 5]
    assert row.branches == (Branch(0, 5), Branch(5, 7, ((0, 3),)), Branch(7, 8, ((0, 3), (1, 2))))
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert row.sources.tolist() == [4, 6, 7]
    assert row.targets.tolist() == [6, 9, 4]


def test_segments_of_a_rewritten_context_are_branches() -> None:
    # turn 0 sees 1 2, says 3 4; the template then drops 4: turn 1 sees 1 2 3 | 5 6, says 7
    segments = [Segment(0, 4, 0), Segment(4, 3, 3)]
    row = grown(Example("p", {"response": strand([1, 2, 3, 4, 5, 6, 7], "0011001", segments)}))

    assert row.ids.tolist() == [1, 2, 3, 5, 6]
    assert row.branches == (Branch(0, 3), Branch(3, 5, ((0, 3),)))
    assert row.sources.tolist() == [1, 2, 4]
    assert row.targets.tolist() == [3, 4, 7]


def test_a_dense_row_is_worth_it_only_where_it_saves_a_quarter() -> None:
    little = pair_of([1, 2, 3, 4, 5, 6], "000111", [1, 9, 8, 7, 6, 5], "000111")
    assert [len(row.ids) for row in arrange(little, "dense")] == [5, 5]
    assert [len(row.ids) for row in arrange(little, "chains")] == [9]


def test_less_than_an_eighth_of_what_follows_is_not_shared() -> None:
    left, right = [1, *range(10, 30)], [1, *range(30, 50)]
    row = grown(pair_of(left, "0" + "1" * 20, right, "0" + "1" * 20))
    assert row.branches == (Branch(0, 20), Branch(20, 40))
    assert row.positions.tolist() == [*range(20), *range(20)]


def test_a_trained_id_that_members_share_is_predicted_once_and_counts_for_each() -> None:
    pair = pair_of([1, 2, 3, 4, 5], "01011", [1, 2, 3, 6, 7], "01011")

    batch = collate([pair], "chains", CPU)

    assert batch.sources_U.tolist() == [0, 2, 2, 3, 4]
    assert batch.targets_U.tolist() == [2, 4, 6, 5, 7]
    assert batch.targets_U[batch.copies_N].tolist() == [2, 4, 5, 2, 6, 7]
    assert batch.owners_N.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_flat_micro_batch_is_one_row_without_padding() -> None:
    pair = pair_of([1, 2, 3, 4, 5], "00011", [1, 2, 3, 6, 7], "00011")
    single = Example("q", {"chosen": strand([5, 6, 7], "001"), "reject": strand([8, 9], "01")})

    batch = collate([pair, single], "chains", CPU)

    assert batch.ids_BT.tolist() == [[1, 2, 3, 4, 6, 5, 6, 8]]
    assert batch.positions_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 3, 0, 1, 0]]
    assert batch.branches == [
        (Branch(0, 4), Branch(4, 5, ((0, 3),)), Branch(5, 7), Branch(7, 8)),
    ]
    assert batch.tokens == 8
    assert batch.owners_N.tolist() == [0, 0, 1, 1, 2, 3]


def test_flex_rows_are_padded_to_a_few_shapes() -> None:
    batch = collate([pair_of([1, 2, 3], "001", [1, 2, 4], "001")], "flex", CPU)
    assert batch.ids_BT.shape == (1, 512)
    assert batch.tokens == 2


def test_collate_points_into_the_flattened_rows_and_keeps_members_apart() -> None:
    long = Example(
        "a", {"chosen": strand([5, 6, 7, 8, 9], "00011"), "reject": strand([6, 7, 8], "011")}
    )
    short = Example("b", {"chosen": strand([7, 8], "01"), "reject": strand([8, 9], "01")})

    batch = collate([long, short], "apart", CPU)

    assert batch.ids_BT.tolist() == [[5, 6, 7, 8], [6, 7, 0, 0], [7, 0, 0, 0], [8, 0, 0, 0]]
    assert batch.sources_U[batch.copies_N].tolist() == [2, 3, 4, 5, 8, 12]
    assert batch.targets_U[batch.copies_N].tolist() == [8, 9, 7, 8, 8, 9]
    assert batch.owners_N.tolist() == [0, 0, 1, 1, 2, 3]
    assert {role: at.tolist() for role, at in batch.members.items()} == {
        "chosen": [0, 2],
        "reject": [1, 3],
    }
    assert batch.rewards_M.tolist() == [5, 6, 7, 8]
    assert batch.numbers_N["old_logprob"].tolist() == [-1, -2, -1, -2, -1, -1]
    assert batch.prompt_ids == ["a", "b"]
    assert batch.tokens == 8
