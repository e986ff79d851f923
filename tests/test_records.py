"""Rows and nouns: what goes to Arrow comes back the same."""

import numpy as np
import pyarrow as pa

from pipeline.records import (
    GROUPS,
    PAIRS,
    RANKED,
    ROLLOUTS,
    GroupExample,
    Member,
    Message,
    PairExample,
    RewardPart,
    Rollout,
    Segment,
    Span,
    TrainingSequence,
    Turn,
)
from pipeline.rows import (
    group_from_row,
    group_row,
    pair_from_row,
    pair_row,
    rollout_from_row,
    rollout_row,
)


def through_arrow(row: dict, schema: pa.Schema) -> dict:
    return pa.Table.from_pylist([row], schema=schema).to_pylist()[0]


def rollout(**changes) -> Rollout:
    call = {"id": "c1", "name": "search", "arguments": '{"q": "x"}'}
    values = {
        "prompt_id": "p",
        "sample": 1,
        "messages": [
            Message(role="user", content="hi \u2028 <|eot_id|>"),
            Message(role="assistant", content="", tool_calls=[call]),
            Message(role="tool", content="found", tool_call_id="c1", name="search"),
        ],
        "turns": [Turn(0, [1, 2], [3], [-0.5], "stop"), Turn(3, [4], [5, 6], None, "length")],
        "branch_turn": None,
        "score_turn": 1,
        "status": "complete",
        "end_reason": "score_turn",
        "tools": "[]",
        "info": {"secret": 17, "zwölf": [1, None]},
    }
    return Rollout(**(values | changes))


def test_rollout_through_arrow():
    assert rollout_from_row(through_arrow(rollout_row(rollout()), ROLLOUTS)) == rollout()


def test_text_rollout_has_no_turns():
    text = rollout(turns=None, branch_turn=2)
    assert rollout_from_row(through_arrow(rollout_row(text), ROLLOUTS)) == text


def test_ranked_rollout_through_arrow():
    ranked = rollout(
        rewards=[None, -99999.0],
        reward_errors=[None, "too_long"],
        reward_parts=[RewardPart("turn", "turn", [0.5, 1.0])],
        reward_model="rule:guessing_game",
    )
    assert rollout_from_row(through_arrow(rollout_row(ranked), RANKED)) == ranked


def sequence() -> TrainingSequence:
    return TrainingSequence(
        ids=np.array([5, 6, 7], dtype=np.int32),
        mask=np.array([0, 1, 1], dtype=np.uint8),
        segments=[Segment(0, 3, 0)],
        spans=[Span(0, 1, 3)],
    )


def same(left: TrainingSequence, right: TrainingSequence) -> bool:
    return (
        left.ids.dtype == right.ids.dtype == np.int32
        and left.mask.dtype == right.mask.dtype == np.uint8
        and left.ids.tolist() == right.ids.tolist()
        and left.mask.tolist() == right.mask.tolist()
        and (left.segments, left.spans) == (right.segments, right.spans)
    )


def test_pair_through_arrow():
    logps = np.array([-0.25, -1.5], dtype=np.float32)
    messages = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    pair = PairExample(
        prompt_id="p",
        branch_turn=0,
        score_turn=3,
        chosen=Member(0, messages, sequence(), 1.5, sample_logprob=logps),
        reject=Member(1, messages, sequence(), -0.5),
        prefix_length=1,
    )
    back = pair_from_row(through_arrow(pair_row(pair), PAIRS))
    assert same(back.chosen.sequence, sequence()) and same(back.reject.sequence, sequence())
    assert back.chosen.sample_logprob is not None
    assert back.chosen.sample_logprob.tolist() == [-0.25, -1.5]
    assert back.reject.sample_logprob is None
    assert back.chosen.messages == messages
    assert (back.chosen.sample, back.reject.sample) == (0, 1)
    assert (back.chosen.reward, back.reject.reward) == (1.5, -0.5)
    assert (back.branch_turn, back.score_turn, back.prefix_length) == (0, 3, 1)


def test_group_through_arrow():
    advantage = np.array([0.5, 0.5], dtype=np.float32)
    back = group_from_row(
        through_arrow(group_row(GroupExample("p", 2, sequence(), 0.7, advantage)), GROUPS)
    )
    assert same(back.sequence, sequence())
    assert back.advantage is not None and back.advantage.tolist() == [0.5, 0.5]
    assert (back.prompt_id, back.sample, back.reward, back.sample_logprob) == ("p", 2, 0.7, None)
