import dataclasses

import numpy as np
import pytest

from pipeline import filters
from pipeline.records import NO_SCORE, Member, Message, Rollout, Segment, Span, TrainingSequence
from play import played


def sequence(ids: list[int], trained: list[int]) -> TrainingSequence:
    mask = np.array([i in trained for i in range(len(ids))], dtype=np.uint8)
    span = Span(0, min(trained, default=0), max(trained, default=-1) + 1)
    return TrainingSequence(np.array(ids, np.int32), mask, [Segment(0, len(ids), 0)], [span])


def member(ids: list[int], trained: list[int], reward: float = 0.0) -> Member:
    return Member(0, [], sequence(ids, trained), reward)


def changed(rollout: Rollout, **changes: object) -> Rollout:
    return dataclasses.replace(rollout, **changes)  # type: ignore[arg-type]


GOOD = played([[1], [2, 3]], branch_turn=1)


def test_a_good_rollout_has_no_reason() -> None:
    assert filters.rollout_reason(GOOD, needs_reward=True) is None


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("failed", {"status": "failed"}),
        ("ended_before_fork", {"branch_turn": 2}),
        ("not_a_dialogue", {"score_turn": 2}),
        ("not_a_dialogue", {"messages": GOOD.messages[1:]}),
        ("not_a_dialogue", {"messages": GOOD.messages[:2]}),
        ("not_a_dialogue", {"messages": []}),
        ("not_a_dialogue", {"messages": [GOOD.messages[1], *GOOD.messages[1:]]}),
        (
            "not_a_dialogue",
            {"messages": [Message(role="wizard", content=""), *GOOD.messages]},
        ),
        ("no_reward", {"rewards": [1.0, NO_SCORE]}),
        ("no_reward", {"rewards": [1.0, None]}),
        ("no_reward", {"rewards": [1.0, float("nan")]}),
        ("no_reward", {"rewards": None}),
    ],
)
def test_reasons(reason: str, changes: dict[str, object]) -> None:
    assert filters.rollout_reason(changed(GOOD, **changes), needs_reward=True) == reason


def test_no_score_elsewhere_costs_nothing() -> None:
    # The seed drops a row for a missing score that nothing reads.
    rollout = changed(GOOD, rewards=[NO_SCORE, 1.0])
    assert filters.rollout_reason(rollout, needs_reward=True) is None
    assert filters.reward_of(rollout) == 1.0


def test_without_rewards_where_none_is_needed() -> None:
    assert filters.rollout_reason(changed(GOOD, rewards=None), needs_reward=False) is None


def test_turns_that_do_not_add_up() -> None:
    # Turn 1 keeps 4 ids of a context of 3.
    rollout = played([[1], [2]], keeps=[0, 4])
    assert filters.not_a_dialogue(rollout) == "not_a_dialogue"
    rollout = played([[1], [2]])
    assert rollout.turns is not None
    rollout.turns[1].logprobs = []
    assert filters.not_a_dialogue(rollout) == "not_a_dialogue"


def test_the_opening_may_hold_assistant_messages_of_the_dataset() -> None:
    opening = [Message(role="user", content="?"), Message(role="assistant", content="!")]
    rollout = changed(GOOD, messages=[*opening, *GOOD.messages])
    assert filters.rollout_reason(rollout, needs_reward=True) is None
    assert filters.policy_messages(rollout) == [3, 5]


def test_truncated_reads_only_trained_turns() -> None:
    rollout = played([[1], [2]])
    assert rollout.turns is not None
    rollout.turns[0].finish_reason = "length"
    assert filters.truncated(rollout, [0, 1]) == "truncated"
    assert filters.truncated(rollout, [1]) is None


def test_empty_and_too_long() -> None:
    assert filters.empty_response(sequence([1, 2], [])) == "empty_response"
    assert filters.empty_response(sequence([1, 2], [1])) is None
    assert filters.too_long(sequence([1, 2, 3], [2]), 2) == "too_long"
    assert filters.too_long(sequence([1, 2, 3], [2]), 3) is None


def test_pairs() -> None:
    left, right = member([1, 2, 3], [2], 0.5), member([1, 2, 4, 3], [2, 3], 0.5)
    assert filters.different_prefix(left, right, 2) is None
    assert filters.different_prefix(left, right, 3) == "different_prefix"
    assert filters.different_prefix(left, member([1, 2], [1]), 2) == "different_prefix"
    assert filters.same_response(left, right) is None
    assert filters.same_response(left, member([9, 9, 3], [2])) == "same_response"
    assert filters.tie(left, right) == "tie"
    assert filters.tie(left, member([1, 2], [1], 0.25)) is None
