"""Rules, and functions of users: scores per prefix, reasons, parameters, no torch."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, EngineError
from pipeline.records import Message, Rollout, Turn
from pipeline.rewards import load_reward, reward_fingerprint

GAME = {"game": "guessing_game", "low": 1, "high": 32, "secret": 17}


def rollout(*said: str, info: dict[str, Any] | None = None) -> Rollout:
    """Alternate user and assistant, the user first."""
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(said)]
    turn = len(said) // 2 - 1
    return Rollout("p", 0, messages, None, None, turn, "complete", "", info=info or {})


def scores(spec: str, item: Rollout, *turns: int) -> tuple[list[Any], list[Any]]:
    scored = load_reward(spec).score([item], [turns])[0]
    return scored.rewards, scored.errors


def test_guessing_game_scores_every_prefix() -> None:
    item = rollout("go", "16", "higher", "hm", "say a number", "twenty", "lower", "17", info=GAME)
    rewards, errors = scores("rule:guessing_game", item, 0, 1, 2, 3)
    # 17..32 is 16 of 32 numbers: 1 - 4/5 bits; no guess leaves it; 17..19 are 3; then 1.
    expected = [0.2, 0.2, 1 - math.log(3) / math.log(32), 1.0]
    assert rewards == pytest.approx(expected)
    assert errors == [None] * 4


def test_guessing_game_needs_a_game() -> None:
    assert scores("rule:guessing_game", rollout("go", "16"), 0) == ([None], ["no_game"])
    for low, secret, high in [(3, 3, 3), (1, 9, 3), ("1", "2", "3"), (None, 2, 3)]:
        one = rollout("go", "16", info={"low": low, "high": high, "secret": secret})
        assert scores("rule:guessing_game", one, 0) == ([None], ["no_game"])


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        ("so 3 + 15 = 18.", "18", 1.0),
        ("The answer is $1,000.", "1000", 1.0),
        ("it is 1000.0", "1,000", 1.0),
        ("18 apples and 3 pears", "18", 0.0),
        ("#### 18", "#### 18", 1.0),
        ("3-4", "4", 1.0),
        ("x = -4", "-4", 1.0),
        ("x = -4", "4", 0.0),
        (r"\boxed{18} in 7 steps", "18", 1.0),
        (r"first \boxed{7}, no: \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\text{blue}}", r"\boxed{\text{blue}}", 1.0),
        ("1/2", "0.5", 1.0),
        ("it is 50%", "50", 1.0),
        ("no idea", "18", 0.0),
        ("18 at 7.", "7", 1.0),
        ("#### 18, or 3 less", "18", 1.0),
        ("x = \u22124", "-4", 1.0),
        ("(5)-4", "4", 1.0),
        ("x is 1,2", "12", 0.0),
        (r"\boxed{1,2}", "12", 0.0),
        (r"\boxed{1{,}000}", "1000", 1.0),
        (r"\boxed{18\%}", "18", 1.0),
        ("1e-05", 1e-05, 1.0),
        ("it is 5", 1e25, 0.0),
        ("1e25", 1e25, 1.0),
        ("it is 2", r"\frac{1}{2}", 0.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        ("so 18", "3 + 15 = 18\n#### 18", 1.0),
        (r"\boxed{1/0}", "1/0", 1.0),
        ("\u0663", "3", 1.0),
    ],
)
def test_final_answer(said: str, answer: str, score: float) -> None:
    item = rollout("what?", said, info={"answer": answer})
    assert scores("rule:final_answer", item, 0) == ([score], [None])


N = 200_000


@pytest.mark.parametrize(
    "said",
    [
        "1" * N,
        "1," * N,
        "111," * N,
        "-" * N,
        "1e" * N,
        "1/" * N,
        "####" * N,
        "\\boxed{" * N,
        "\\boxed{" + "{" * N,
        "\\boxed{" + "111," * N + "}",
        "\\boxed{" + "1" * N + "}",
        "\\boxed{1e999999999}",
    ],
    ids=lambda said: said[:12],
)
@pytest.mark.timeout(20)
def test_hostile_answers_take_linear_time(said: str) -> None:
    """A quadratic pattern needs hours for these."""
    item = rollout("what?", said, info=GAME | {"answer": "18"})
    assert scores("rule:final_answer", item, 0) == ([0.0], [None])
    assert scores("rule:format", item, 0)[1] == [None]
    assert scores("rule:guessing_game", item, 0)[1] == [None]


def test_final_answer_reads_each_turn_alone() -> None:
    item = rollout("what?", "18", "sure?", "no, 17", "really?", "it was 18", info={"answer": 18})
    assert scores("rule:final_answer", item, 0, 1, 2)[0] == [1.0, 0.0, 1.0]
    assert scores("rule:final_answer", rollout("what?", "18"), 0) == ([None], ["no_answer"])


def test_length_with_parameters() -> None:
    item = rollout("hi", "one two three", "more", "one " * 6)
    assert scores("rule:length", item, 0, 1)[0] == [1.0, 1.0]
    assert scores("rule:length?max_words=5", item, 0, 1)[0] == [1.0, 0.0]
    assert scores("rule:length?min_words=4&max_words=6", item, 0, 1)[0] == [0.0, 1.0]


def test_format_from_default_parameter_and_info() -> None:
    item = rollout("hi", "so\n#### 18", "more", "18")
    assert scores("rule:format", item, 0, 1)[0] == [1.0, 0.0]
    assert scores("rule:format?pattern=^[0-9]%2B$", item, 0, 1)[0] == [0.0, 1.0]
    assert scores("rule:format?pattern=^[0-9]+$", item, 0, 1)[0] == [0.0, 1.0]
    item.info = {"format": "^so"}
    assert scores("rule:format", item, 0, 1)[0] == [1.0, 0.0]
    for bad in ("(", 5):
        item.info = {"format": bad}
        assert scores("rule:format", item, 0) == ([None, None], ["bad_format", None])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("rule:nothing", "there are: guessing_game, final_answer"),
        ("rule:lenght", "did you mean 'length'"),
        ("rule:format?pattern=(", "no regular expression"),
        ("rule:length?most=3", "no parameter most; there are: min_words, max_words"),
        ("rule:length?max_words=few", "invalid literal"),
        ("python:here.py", "write python:path/to/file.py:function"),
        ("python:/nowhere/rewards.py:score", "no file /nowhere/rewards.py"),
    ],
)
def test_bad_specs(spec: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_reward(spec)


def test_empty_and_absent_turns_have_reasons() -> None:
    item = rollout("hi", "  ", "more", "ok")
    assert scores("rule:length", item, 0, 1, 2) == (
        [None, 1.0, None],
        ["empty_response", None, "no_policy_turn"],
    )
    strange = rollout("hi", "ok")
    strange.messages[0]["role"] = "narrator"
    assert scores("rule:length", strange, 0) == ([None], ["not_a_dialogue"])
    assert scores("rule:length", rollout(), 0) == ([None], ["not_a_dialogue"])


def test_policy_turns_follow_the_prompts_own_assistant_messages() -> None:
    item = rollout("a", "one two", "b", "three", "c", "four five six")
    item.turns = [Turn(0, [1], [2], None, "stop")] * 2
    assert scores("rule:length?max_words=1", item, 0, 1)[0] == [1.0, 0.0]


def function(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"def score(messages, info):\n    {body}\n")
    return f"python:{path}:score"


def test_function_sees_each_prefix_and_may_give_a_reason(tmp_path: Path) -> None:
    body = "return 'odd' if info['n'] % 2 else len(messages) + info['n']"
    spec = function(tmp_path, body)
    item = rollout("hi", "a", "more", "b", info={"n": 4})
    assert scores(spec, item, 0, 1) == ([6.0, 8.0], [None, None])
    item.info = {"n": 3}
    assert scores(spec, item, 0) == ([None, None], ["odd", None])


def test_function_cannot_change_the_rollout(tmp_path: Path) -> None:
    item = rollout("hi", "a")
    scores(function(tmp_path, "messages[1]['content'] = 'x'; info['y'] = 1; return 1"), item, 0)
    assert item.messages[1]["content"] == "a" and item.info == {}


def test_what_a_function_raises_stops_the_stage_with_the_row(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        scores(function(tmp_path, "return 1 / 0"), rollout("hi", "a"), 0)
    assert "prompt_id 'p', sample 0, policy turn 0" in caught.value.__notes__[0]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_score_that_is_no_number_stops_the_stage(tmp_path: Path, value: str) -> None:
    with pytest.raises(EngineError, match="prompt_id 'p', sample 0, policy turn 0"):
        scores(function(tmp_path, f"return {value}"), rollout("hi", "a"), 0)


def test_function_must_return_a_number_or_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="returned None"):
        scores(function(tmp_path, "return None"), rollout("hi", "a"), 0)


def test_fingerprint_follows_the_function(tmp_path: Path) -> None:
    before = reward_fingerprint(function(tmp_path, "return 1"))
    assert reward_fingerprint(function(tmp_path, "return 1")) == before
    assert reward_fingerprint(function(tmp_path, "return 2")) != before
    assert reward_fingerprint("rule:length") != reward_fingerprint("rule:length?max_words=5")


def test_rules_do_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.rewards import load_reward; load_reward('rule:final_answer');"
        "import pipeline.scoring; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
