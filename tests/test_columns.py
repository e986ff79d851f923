"""Arrow columns as examples: pairs, rollouts, groups; lists of every kind, sliced or not."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import columns, store
from pipeline.columns import PAIR_SIDES, of_side, ragged, side_columns
from pipeline.records import Segment
from tests import multiturn


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)]
)
def test_ragged_reads_every_kind_of_list_and_slices(kind: pa.DataType) -> None:
    column = pa.array([[1, 2], [3, 4], [5, 6]], type=kind)

    assert [row.tolist() for row in ragged(column)] == [[1, 2], [3, 4], [5, 6]]
    assert [row.tolist() for row in ragged(column.slice(1, 2))] == [[3, 4], [5, 6]]


def test_a_null_list_has_no_values() -> None:
    column = pa.array([[1], None, [], [2, 3]], type=pa.list_(pa.float32()))

    assert [row.tolist() for row in ragged(column)] == [[1.0], [], [], [2.0, 3.0]]


def test_columns_are_named_by_their_side() -> None:
    assert side_columns(("chosen",), ["x"]) == [
        "chosen_token",
        "chosen_mask",
        "chosen_segments",
        "chosen_x",
    ]
    assert side_columns(("",)) == ["token", "mask", "segments"]


def test_a_pair_is_read_with_its_numbers_and_rewards(tmp_path: Path) -> None:
    repo = store.open_repo(multiturn.pairs_repo(tmp_path / "pairs", "all", train=3))
    (batch,) = repo.batches("train")
    for side in PAIR_SIDES:
        masks = ragged(batch.column(of_side(side, "mask")))
        values = pa.array([np.arange(mask.sum()) for mask in masks], pa.list_(pa.float32()))
        batch = batch.append_column(of_side(side, "ref_logprob"), values)

    examples = columns.pairs([batch], {"ref": "ref_logprob"})

    expected = [multiturn.pair(i, "all") for i in range(3)]
    assert [e.prompt_id for e in examples] == ["p000", "p001", "p002"]
    for example, pair in zip(examples, expected, strict=True):
        assert list(example.strands) == ["chosen", "reject"]
        for strand, member in zip(
            example.strands.values(), (pair.chosen, pair.reject), strict=True
        ):
            assert strand.ids.tolist() == member.sequence.ids.tolist()
            assert strand.mask.tolist() == member.sequence.mask.tolist()
            assert strand.segments == [Segment(0, len(strand.ids), 0)]
            assert strand.reward == member.reward
            assert strand.numbers["ref"].tolist() == list(range(int(strand.mask.sum())))


def test_groups_join_the_rollouts_of_a_prompt(tmp_path: Path) -> None:
    repo = store.open_repo(multiturn.groups_repo(tmp_path / "groups", (3, 1, 4)))
    # The border between two batches runs through the last group.
    batches = list(repo.batches("train", batch_rows=5))
    assert [batch.num_rows for batch in batches] == [5, 3]

    groups, rollouts = columns.groups(batches, {}), columns.rollouts(batches, {})

    assert [(g.prompt_id, list(g.strands)) for g in groups] == [
        ("g0", ["0", "1", "2"]),
        ("g1", ["0"]),
        ("g2", ["0", "1", "2", "3"]),
    ]
    members = [strand for group in groups for strand in group.strands.values()]
    assert [r.prompt_id for r in rollouts] == ["g0"] * 3 + ["g1"] + ["g2"] * 4
    for strand, rollout in zip(members, rollouts, strict=True):
        assert strand.ids.tolist() == rollout.strands["response"].ids.tolist()
