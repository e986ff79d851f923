"""The contract of `python:file.py:function`: scopes, parameters, parts, and wrong returns."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, EngineError
from pipeline.records import Message, Rollout, Turn
from pipeline.rewards import load_reward, reward_fingerprint
from pipeline.rewards.base import Scored
from pipeline.rewards.parameters import read_query
from pipeline.scoring import Chunk, score_chunk

EXAMPLE = '''
"""Reward a short answer that calls the search tool before it answers."""

import json


def score(messages, info, tools=None, max_words: int = 50):
    """The reward of one turn: messages[-1] is the policy's."""
    words = len((messages[-1].get("content") or "").split())
    if words > 10 * max_words:
        return "rambling"
    known = {tool["function"]["name"] for tool in tools or []}
    calls = [call for m in messages for call in m.get("tool_calls") or []]
    return {
        "reward": float(words <= max_words),
        "parts": {"known_tools": sum(call["name"] in known for call in calls)},
    }


def whole(messages, info):
    """The reward of a dialogue, and of each of its policy turns."""
    said = [m for m in messages if m["role"] == "assistant"]
    if info.get("answer") is None:
        return "no_answer"
    right = [info["answer"] in (m.get("content") or "") for m in said]
    queries = [json.loads(c["arguments"]) for m in said for c in m.get("tool_calls") or []]
    return {
        "reward": [*(0.1 * r for r in right[:-1]), float(right[-1])],
        "parts": {"right": right, "queries": len(queries)},
    }
'''


def rollout(*said: str, **changes: Any) -> Rollout:
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(said)]
    values = {"info": {}, "score_turn": len(said) // 2 - 1} | changes
    return Rollout("p", 3, messages, None, None, status="complete", end_reason="", **values)


def write(folder: Path, body: str, head: str = "messages, info") -> str:
    path = folder / "mine.py"
    path.write_text(f"def score({head}):\n    {body}\n")
    return f"python:{path}:score"


def scored(spec: str, item: Rollout, *turns: int) -> Scored:
    return load_reward(spec).score([item], [turns])[0]


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE)
    assert EXAMPLE.strip() in (Path(__file__).parents[1] / "README.md").read_text()
    item = rollout("who?", "let me look", "so?", "it is Ann", info={"answer": "Ann"})
    item.tools = '[{"type": "function", "function": {"name": "search"}}]'
    item.messages[1]["tool_calls"] = [{"id": "1", "name": "search", "arguments": "{}"}]
    turns = scored(f"python:{path}:score?max_words=2", item, 0, 1)
    assert turns.rewards == [0.0, 0.0]
    assert scored(f"python:{path}:score", item, 0, 1).rewards == [1.0, 1.0]
    assert [(p.name, p.kind, p.values) for p in turns.parts] == [("known_tools", "turn", [1, 1])]
    item.messages[3]["content"] = "so " * 501
    assert scored(f"python:{path}:score", item, 0, 1).errors == [None, "rambling"]
    item.messages[3]["content"] = "it is Ann"
    whole = scored(f"python:{path}:whole?scope=dialogue", item, 0, 1)
    assert (whole.rewards, whole.errors) == ([0.0, 1.0], [None, None])
    assert [(p.name, p.kind, p.values) for p in whole.parts] == [
        ("right", "turn", [0.0, 1.0]),
        ("queries", "outcome", [None, 1.0]),
    ]
    item.info = {}
    assert scored(f"python:{path}:whole?scope=dialogue", item, 1).errors == [None, "no_answer"]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("1", 1.0),
        ("True", 1.0),
        ("Decimal('0.5')", 0.5),
        ("Fraction(1, 4)", 0.25),
        ("np.float32(0.5)", 0.5),
        ("np.int64(3)", 3.0),
        ("np.bool_(True)", 1.0),
        ("np.array(2.5)", 2.5),
    ],
)
def test_numbers_of_every_kind(tmp_path: Path, value: str, number: float) -> None:
    head = "import numpy as np; from decimal import Decimal; from fractions import Fraction; return"
    got = scored(write(tmp_path, f"{head} {value}"), rollout("hi", "a"), 0).rewards
    assert got == [number] and type(got[0]) is float


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        ("None", DataError, "returned None"),
        ("b'3'", DataError, "returned b'3'"),
        ("[1.0]", DataError, r"returned \[1.0\]"),
        ("' '", DataError, "an empty reason"),
        ("-99999", DataError, "stands for no score"),
        ("{'score': 1}", DataError, "the keys 'score'"),
        ("{'reward': 1, 'part': {}}", DataError, "the keys 'reward', 'part'"),
        ("{'reward': 1, 'parts': {'': 1}}", DataError, "the parts {'': 1}"),
        ("{'reward': 1, 'parts': {'a\\nb': 1}}", DataError, "no mapping of names"),
        ("{'reward': 1, 'parts': {'a': 'b'}}", DataError, "returned 'b'"),
        ("{'reward': 1, 'parts': {'a': float('nan')}}", EngineError, "returned nan"),
        ("float('inf')", EngineError, "returned inf"),
        ("-1e101", EngineError, "returned -1e"),
        ("10 ** 400", EngineError, "returned 1000"),
        ("10 ** 9999", EngineError, "a huge int"),
    ],
)
def test_a_wrong_return_names_the_row(
    tmp_path: Path, value: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        scored(write(tmp_path, f"return {value}"), rollout("hi", "a"), 0)
    assert "prompt_id 'p', sample 3, policy turn 0" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_reasons_are_one_bounded_line(tmp_path: Path) -> None:
    spec = write(tmp_path, "return info['reason']")
    for reason, kept in [
        (" two\nlines\t", "two lines"),
        ("\x1b[31mred\u202e \ud800", "\ufffd[31mred\ufffd \ufffd"),
        ("x" * 10_000, "x" * 199 + "…"),
    ]:
        item = rollout("hi", "a", info={"reason": reason})
        assert scored(spec, item, 0).errors == [kept]


def test_one_number_is_the_score_turns_whichever_turns_are_asked_for(tmp_path: Path) -> None:
    spec = write(tmp_path, "return {'reward': len(messages), 'parts': {'n': 2}}")
    spec += "?scope=dialogue"
    item = rollout("a", "b", "c", "d", "e", "f", score_turn=1)
    for asked in ([1], [0, 1, 2]):
        got = scored(spec, item, *asked)
        assert (got.rewards, got.errors) == ([None, 4.0, None], [None] * 3)
        assert [(p.kind, p.values[1]) for p in got.parts] == [("outcome", 2.0)]


def test_a_list_has_an_entry_for_each_turn_and_only_asked_ones_are_kept(tmp_path: Path) -> None:
    body = "return {'reward': [None, 'why', 3], 'parts': {'n': [1, None, 2]}}"
    spec = write(tmp_path, body) + "?scope=dialogue"
    item = rollout("a", "b", "c", "d", "e", "f")
    every, needed = scored(spec, item, 0, 1, 2), scored(spec, item, 2)
    assert (every.rewards, every.errors) == ([None, None, 3.0], [None, "why", None])
    assert (needed.rewards, needed.errors) == ([None, None, 3.0], [None] * 3)
    assert every.parts[0].values == [1.0, None, 2.0]
    assert needed.parts[0].values == [None, None, 2.0]
    item.messages[1]["content"] = " "
    assert scored(spec, item, 0, 1, 2).errors == ["empty_response", "why", None]


def test_a_dialogue_whose_score_turn_cannot_be_scored_is_not_scored(tmp_path: Path) -> None:
    spec = write(tmp_path, "raise AssertionError") + "?scope=dialogue"
    got = scored(spec, rollout("a", "b", "c", " "), 0, 1)
    assert (got.rewards, got.errors) == ([None, None], [None, "empty_response"])


@pytest.mark.parametrize("value", ["[1.0]", "[1.0, 2.0, 3.0]", "[1.0, None]", "[]", "None"])
def test_lists_of_a_wrong_length_or_without_a_last_entry(tmp_path: Path, value: str) -> None:
    spec = write(tmp_path, f"return {value}") + "?scope=dialogue"
    with pytest.raises(DataError, match="sample 3, policy turn 1"):
        scored(spec, rollout("a", "b", "c", "d"), 0, 1)


def test_arrays_and_tensors_are_lists(tmp_path: Path) -> None:
    spec = write(tmp_path, "import numpy as np; return np.array([1.5, 2.0])") + "?scope=dialogue"
    assert scored(spec, rollout("a", "b", "c", "d"), 0, 1).rewards == [1.5, 2.0]


def test_parameters_have_the_type_of_their_defaults(tmp_path: Path) -> None:
    head = "messages, info, n: int = 2, x=0.5, on=True, name='a', other=None"
    spec = write(tmp_path, "return f'{n!r} {x!r} {on!r} {name!r} {other!r}'", head)
    item = rollout("hi", "a")
    assert scored(spec, item, 0).errors == ["2 0.5 True 'a' None"]
    given = spec + "?n=3&x=1e-3&on=false&name=a+b%26c:d&other=z"
    assert scored(given, item, 0).errors == ["3 0.001 False 'a+b&c:d' 'z'"]
    assert reward_fingerprint(given) != reward_fingerprint(spec)


@pytest.mark.parametrize(
    ("head", "query", "told"),
    [
        ("messages, info", "?n=3", "no parameter n; there are: scope"),
        ("messages, info, n=1", "?n=few", "invalid literal"),
        ("messages, info, n=True", "?n=maybe", "neither true nor false"),
        ("messages, info, n=()", "?n=1", "can't be given as text"),
        ("messages, info, n=1", "?n=1&n=2", "occurs twice"),
        ("messages, info", "?n", "isn't name=value"),
        ("messages, info", "?scope=turns", "scope='turns'; there are: turn, dialogue"),
        ("messages", "", "can't be called with"),
        ("messages, info, more", "", "can't be called with"),
    ],
)
def test_specs_that_do_not_fit_the_function(
    tmp_path: Path, head: str, query: str, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        load_reward(write(tmp_path, "return 1", head) + query)


def test_async_functions_and_absent_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("async def score(messages, info):\n    return 1\nx = 1\n")
    for name, told in [("score", "an async function"), ("x", "no function"), ("y", "no function")]:
        with pytest.raises(DataError, match=told):
            load_reward(f"python:{path}:{name}")


def test_a_function_may_use_dataclasses_and_change_nested_arguments(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def score(messages, info):\n    info['l'].append(A(1).x)\n"
        "    messages[1]['tool_calls'].clear()\n    return len(info['l'])\n"
    )
    item = rollout("hi", "a", info={"l": []})
    item.messages[1]["tool_calls"] = [{"id": "1", "name": "n", "arguments": "{}"}]
    assert scored(f"python:{path}:score", item, 0).rewards == [1.0]
    assert item.info == {"l": []} and len(item.messages[1]["tool_calls"] or []) == 1


def test_parts_reach_the_journal_beside_the_rewards(tmp_path: Path) -> None:
    spec = write(tmp_path, "return {'reward': 'odd' if info['n'] else 2, 'parts': {'a': 1}}")
    items = [rollout("hi", "a", info={"n": n}) for n in (0, 1)]
    records = score_chunk(load_reward(spec), Chunk("train", 0, [0, 1], items), "needed")
    assert records[0] == {"rewards": [2.0], "errors": [None], "parts": [["a", "turn", [1.0]]]}
    assert records[1]["parts"] == [["a", "turn", [-99999.0]]]


def test_prompts_own_assistant_messages_are_no_turns_of_a_list(tmp_path: Path) -> None:
    spec = write(tmp_path, "return [1.0, 2.0]") + "?scope=dialogue"
    item = rollout("a", "own", "b", "c", "d", "e", score_turn=1)
    item.turns = [Turn(0, [1], [2], None, "stop")] * 2
    assert scored(spec, item, 0, 1).rewards == [1.0, 2.0]


def test_queries_keep_a_plus_sign() -> None:
    assert read_query("s", "pattern=^[0-9]+$&x=%2B=") == {"pattern": "^[0-9]+$", "x": "+="}
