"""Datasets of text as others shape them: TRL's, HH's, UltraInteract's, and what is none of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, RowError
from pipeline.records import Rollout
from pipeline.text_messages import messages_of, tools_of
from pipeline.text_rows import (
    reader_of,
    rollouts_of_completion,
    rollouts_of_dialogue,
    rollouts_of_text,
    text_rollouts,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
USER = {"role": "user", "content": "Hi?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Hi?\n\nAssistant:"


def texts(rollouts: list[Rollout]) -> list[list[tuple[str, Any]]]:
    return [[(m["role"], m["content"]) for m in rollout.messages] for rollout in rollouts]


EXPECTED = [
    [("user", "Hi?"), ("assistant", "Yes.")],
    [("user", "Hi?"), ("assistant", "No.")],
]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, YES], "rejected": [USER, NO]},  # TRL, the prompt implicit
        {"chosen": [USER, YES], "reject": [USER, NO]},  # REFUEL's name
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},  # TRL, the prompt explicit
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {"prompt": "Hi?", "chosen": [USER, YES], "rejected": [USER, NO]},  # UltraFeedback
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": HH + " Yes.", "rejected": HH + " No."},
        {"prompt": HH, "chosen": " Yes.", "rejected": " No."},
        {"prompt": HH, "chosen": HH + " Yes.", "rejected": HH + " No."},
        {"prompt": HH + " ", "chosen": [YES], "rejected": [NO]},
        {
            "trajectory": [{"from": "human", "value": "Hi?"}],  # UltraInteract
            "chosen": "Yes.",
            "rejected": "No.",
        },
    ],
)
def test_preferences(row: dict[str, Any]) -> None:
    read, columns = reader_of(list(row), "pairs", "it")
    assert set(columns) == set(row)
    rollouts = read(row)
    assert texts(rollouts) == EXPECTED
    assert [r.rewards for r in rollouts] == [[1.0], [0.0]]
    assert {(r.branch_turn, r.score_turn, r.turns) for r in rollouts} == {(0, 0, None)}
    assert rollouts[0].prompt_id == rollouts[1].prompt_id


@pytest.mark.parametrize(
    ("names", "values", "rewards"),
    [
        (("score_chosen", "score_rejected"), (7, 3.5), [[7.0], [3.5]]),
        (("chosen_score", "rejected_score"), (1.0, None), [[1.0], [None]]),
        (("chosen-rating", "rejected-rating"), (float("nan"), 2), [[None], [2.0]]),
        (("chosen_reward", "rejected_reward"), ("high", 0.5), [[None], [0.5]]),
        (("score_chosen", "other"), (7, 3), [[1.0], [0.0]]),
    ],
)
def test_scores(names: Any, values: Any, rewards: Any) -> None:
    row = {"chosen": [USER, YES], "rejected": [USER, NO]} | dict(zip(names, values, strict=True))
    assert [rollout.rewards for rollout in rollouts_of_text(row)] == rewards


def test_a_pair_parts_where_its_texts_do() -> None:
    system = {"role": "system", "content": "Be brief."}
    start = [system, USER, YES, {"role": "user", "content": "Sure?"}]
    after = [{"role": "user", "content": "Why?"}, YES]
    left, right = rollouts_of_text(
        {"prompt": start, "chosen": [NO, *after], "rejected": [YES], "tools": [{"type": "x"}]}
    )
    assert (left.branch_turn, left.score_turn, right.score_turn) == (1, 2, 1)
    assert left.rewards == [None, None, 1.0]
    assert left.messages[0] == system
    assert left.tools == right.tools == '[{"type": "x"}]'


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("not_a_pair", {"chosen": [USER, YES], "rejected": [USER, YES]}),
        ("not_a_pair", {"chosen": [USER, YES], "rejected": [{**USER, "content": "?"}, YES]}),
        ("not_a_dialogue", {"prompt": [USER], "chosen": [{**USER, "content": "?"}, YES]}),
        ("not_a_dialogue", {"chosen": "The sky is blue."}),
        ("not_a_dialogue", {"chosen": 3}),
        ("not_a_dialogue", {"chosen": [["user", "Hi?"]]}),
        ("not_a_dialogue", {"chosen": [{"role": "user", "content": [{"type": "image"}]}, YES]}),
        ("not_a_dialogue", {"chosen": [USER, {**YES, "tool_calls": [{"function": "f"}]}]}),
        ("not_a_dialogue", {"chosen": [USER, {**YES, "tool_calls": [{"name": None}]}]}),
        ("not_a_dialogue", {"chosen": [USER, {**YES, "tool_calls": "f()"}]}),
        ("tools_unreadable", {"tools": 3}),
        ("tools_unreadable", {"tools": [{"name": b"bytes"}]}),
    ],
)
def test_rows_that_are_no_pair(reason: str, row: dict[str, Any]) -> None:
    whole = {"chosen": [USER, YES], "rejected": [USER, NO]} | row
    with pytest.raises(RowError) as caught:
        rollouts_of_text(whole)
    assert caught.value.reason == reason
    told = [left for _, left in text_rollouts([whole], rollouts_of_text)]
    assert [(left[0]["row"], left[0]["reason"]) for left in told] == [(0, reason)]


@pytest.mark.parametrize(
    ("prompt", "completion", "fork"),
    [
        ([USER], [YES], 0),
        ("Hi?", "Yes.", 0),
        (HH, " Yes.", 0),
        ([USER, NO, USER], [YES, USER, NO], 1),
        ([USER, NO, USER], [USER, NO, USER, YES], 1),
        ("\n\nHuman: Hi?\n\nAssistant: No.\n\nHuman: Hi?\n\nAssistant:", "Yes.", 1),
    ],
)
def test_a_completion_is_what_the_policy_says(prompt: Any, completion: Any, fork: int) -> None:
    row = {"prompt": prompt, "completion": completion}
    read, _ = reader_of(row, "groups", "it")
    assert read is rollouts_of_completion
    (rollout,) = read(row)
    assert rollout.branch_turn == fork
    spoken = [m for m in rollout.messages if m["role"] == "assistant"]
    assert spoken[fork]["content"] == "Yes."
    assert rollout.rewards == [None] * len(spoken)


def test_dialogues_come_first_for_groups_and_preferences_for_pairs() -> None:
    columns = ["prompt", "chosen", "rejected", "messages", "score_chosen", "score_rejected", "x"]
    assert reader_of(columns, "groups", "it") == (rollouts_of_dialogue, ["messages"])
    read, used = reader_of(columns, "pairs", "it")
    assert read is rollouts_of_text
    assert used == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    (rollout,) = rollouts_of_dialogue(
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}
    )
    assert texts([rollout]) == EXPECTED[:1]
    assert rollout.branch_turn is None
    with pytest.raises(DataError, match=r"it has no columns that --format pairs reads.*has: text"):
        reader_of(["text"], "pairs", "it")


def test_messages_keep_what_templates_read() -> None:
    call = {
        "id": 7,
        "type": "function",
        "function": {"name": "f", "arguments": {"a": 1, "b": None}},
    }
    ours = {"id": "x", "name": "g", "arguments": "not JSON"}
    said = [
        {**USER, "weight": 1, "name": None},
        {"role": "gpt", "content": None, "tool_calls": [call, ours]},
        {"role": "tool", "content": "8", "tool_call_id": "7", "name": "f"},
        {"role": "assistant", "content": "8", "reasoning_content": "It said 8."},
    ]
    assert messages_of(said) == [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "7", "name": "f", "arguments": '{"a": 1}'}, ours],
        },
        {"role": "tool", "content": "8", "tool_call_id": "7", "name": "f"},
        {"role": "assistant", "content": "8", "reasoning_content": "It said 8."},
    ]
    assert tools_of([]) is None
    assert tools_of('[{"name": "f"}]') == '[{"name": "f"}]'
    assert tools_of([{"name": "f", "strict": None}]) == '[{"name": "f"}]'


def test_rows_of_one_prompt_have_keys_of_their_own() -> None:
    pairs = [{"chosen": [USER, {**YES, "content": str(i)}], "rejected": [USER, NO]} for i in "abab"]
    found = list(text_rollouts(pairs, rollouts_of_text))
    assert [[r.sample for r in rollouts] for rollouts, _ in found] == [[0, 1], [2, 3], [], []]
    assert [left[0] for _, left in found[2:]] == [
        {"row": row, "reason": "duplicate", "detail": "an earlier row says the same"}
        for row in (2, 3)
    ]
    singles = [{"messages": [USER, {**YES, "content": str(i)}]} for i in range(3)]
    found = list(text_rollouts(singles, rollouts_of_dialogue))
    assert [rollouts[0].sample for rollouts, _ in found] == [0, 1, 2]


@pytest.mark.skipif(not DATA.exists(), reason="shared/data holds real inputs, and isn't here")
def test_real_rows_are_read() -> None:
    with gzip.open(DATA / "hh_rlhf_harmless_test_600.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = list(text_rollouts(rows, reader_of(rows[0], "pairs", "HH")[0]))
    reasons = sorted(left[0]["reason"] for _, left in found if left)
    assert len(rows) == 600
    assert sum(bool(rollouts) for rollouts, _ in found) >= 590, reasons
    for rollouts, _ in found:
        assert {r.branch_turn for r in rollouts} <= {r.score_turn for r in rollouts}
    with (DATA / "ultrainteract_style_gsm8k.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = list(text_rollouts(rows, reader_of(rows[0], "pairs", "UltraInteract")[0]))
    assert [left for _, left in found if left] == []
    for row, (rollouts, _) in zip(rows, found, strict=True):
        assert rollouts[0].messages[-1]["content"] == row["chosen"]
        assert len(rollouts[0].messages) == len(row["trajectory"]) + 1
