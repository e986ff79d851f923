"""Built-in rules: functions (messages, info) -> a score, or the reason why there is none.

`messages` is the dialogue up to a policy turn, whose message is the last. A rule's parameters:
`rule:length?max_words=50`. No torch here: ranking by rule starts in a fraction of a second.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pipeline.environments import guessing_game
from pipeline.errors import DataError
from pipeline.records import Message
from pipeline.rewards.base import Settings
from pipeline.rewards.functions import FunctionReward, digest
from pipeline.thoughts import spoken

Rule = Callable[..., float | str]

# A minus sign counts only where it can't be a dash or a subtraction: "3-4" ends with 4.
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*)?\.?\d+(?:/\d+)?|\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def guessing_game_rule(messages: Sequence[Message], info: dict[str, Any]) -> float | str:
    """Score how far the interval that is still possible has shrunk, 0..1."""
    if not {"low", "high", "secret"} <= info.keys() or not info["low"] < info["high"]:
        return "no_game"
    said = [spoken(message) for message in messages if message.get("role") == "assistant"]
    return guessing_game.score(info, said)


def final_answer_rule(messages: Sequence[Message], info: dict[str, Any]) -> float | str:
    r"""Score 1 where the message's answer equals `info["answer"]`, else 0.

    The answer is what the last \boxed{} holds, or the last number. "1,000", "1000.0" and "$1000"
    are equal; so are "1/2" and "0.5". GSM8K's "#### 18" is read as 18.
    """
    if info.get("answer") is None:
        return "no_answer"
    wanted = answer_of(str(info["answer"])) or str(info["answer"])
    found = answer_of(spoken(messages[-1]))
    return float(found is not None and _value(found) == _value(wanted))


def length_rule(
    messages: Sequence[Message], info: dict[str, Any], min_words: int = 1, max_words: int = 200
) -> float:
    """Score 1 where the message has min_words to max_words words, else 0."""
    return float(min_words <= len(spoken(messages[-1]).split()) <= max_words)


def format_rule(
    messages: Sequence[Message], info: dict[str, Any], pattern: str = r"####\s*\S"
) -> float:
    """Score 1 where the message matches `info["format"]` (a regular expression) or `pattern`."""
    return float(re.search(info.get("format") or pattern, spoken(messages[-1])) is not None)


RULES: dict[str, Rule] = {
    "guessing_game": guessing_game_rule,
    "final_answer": final_answer_rule,
    "length": length_rule,
    "format": format_rule,
}


def load(spec: str, settings: Settings) -> FunctionReward:
    """Make the reward of `rule:<name>` or `rule:<name>?<parameter>=<value>&...`."""
    name, _, query = spec.removeprefix("rule:").partition("?")
    if name not in RULES:
        raise DataError(f"there is no rule {name!r}; there are: {', '.join(RULES)}")
    rule = partial(RULES[name], **_parameters(spec, RULES[name], query))
    return FunctionReward(spec, fingerprint(spec), rule)


def fingerprint(spec: str) -> str:
    """Hash the spec and the rules' own code: another rule is another reward."""
    return digest(spec.encode(), Path(__file__).read_bytes())


def _parameters(spec: str, rule: Rule, query: str) -> dict[str, Any]:
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(rule).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := given.keys() - known.keys():
        raise DataError(
            f"{spec!r}: no parameter {', '.join(sorted(unknown))};"
            f" there are: {', '.join(known) or 'none'}"
        )
    try:
        return {name: type(known[name])(value) for name, value in given.items()}
    except ValueError as error:
        raise DataError(f"{spec!r}: {error}") from None


def answer_of(text: str) -> str | None:
    r"""Return what the last \boxed{} of a text holds, or its last number; None without either."""
    if (boxed := _boxed(text)) is not None:
        return boxed
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _value(answer: str) -> Fraction | str:
    bare = re.sub(r"[\s,$]|\\?%", "", answer).rstrip(".")
    bare = re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", bare)
    try:
        return Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return bare
