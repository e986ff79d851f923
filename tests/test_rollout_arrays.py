"""Columns of foreign repos are read as ours, or refused with their name."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.records import RANKED
from pipeline.rollout_arrays import Rollouts, typed
from pipeline.rows import rollout_row
from play import played

ROLLOUTS = [played([[1], [2]]), played([[3], [4]], sample=1)]
OURS = pa.RecordBatch.from_pylist([rollout_row(one) for one in ROLLOUTS], schema=RANKED)
FIXED_TURN = pa.struct(
    [
        ("finish_reason", pa.string()),
        ("keep", pa.int64()),
        ("prompt_ids", pa.list_(pa.int64(), 2)),
        ("response_ids", pa.list_(pa.uint32())),
        ("logprobs", pa.list_(pa.float64())),
    ]
)


def with_column(name: str, column: pa.Array) -> pa.RecordBatch:
    return OURS.set_column(OURS.schema.get_field_index(name), name, column)


def fewer_fields(messages: list[Any]) -> pa.Array:
    """Messages as most datasets have them: two fields, in any order."""
    return pa.array([[{k: one[k] for k in ("content", "role")} for one in row] for row in messages])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prompt_id", lambda column: column.dictionary_encode()),
        ("prompt_id", lambda column: column.cast(pa.string_view())),
        ("rewards", lambda column: pa.array(column.to_pylist(), pa.list_(pa.float64(), 2))),
        ("rewards", lambda column: column.cast(pa.list_(pa.float32()))),
        ("branch_turn", lambda column: pa.nulls(len(column))),
        ("messages", lambda column: fewer_fields(column.to_pylist())),
        ("turns", lambda column: pa.array(column.to_pylist(), pa.list_(FIXED_TURN))),
    ],
)
def test_another_type_is_the_same_rollout(
    name: str, change: Callable[[pa.Array], pa.Array]
) -> None:
    assert typed(with_column(name, change(OURS.column(name))), "x").equals(typed(OURS, "x"))


@pytest.mark.parametrize(
    ("name", "column", "told"),
    [
        ("sample", pa.array(["a", "b"]), "x, column 'sample' holds string, which is no int32"),
        ("score_turn", pa.array([0.5, 1.0]), "x, column 'score_turn' holds double"),
        ("messages", pa.array([1, 2]), "x, column 'messages' holds int64"),
    ],
)
def test_a_column_that_means_something_else_is_named(
    name: str, column: pa.Array, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        typed(with_column(name, column), "x")


def test_what_is_absent_is_null() -> None:
    few = OURS.select(["prompt_id", "sample", "messages", "turns", "score_turn"])
    rollouts = Rollouts(typed(few, "x"))
    assert rollouts.failed.tolist() == [False, False]
    assert rollouts.has_fork.tolist() == [False, False]
    assert [reward != reward for reward in rollouts.reward.tolist()] == [True, True]
