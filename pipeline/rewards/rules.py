"""Built-in rules: functions (messages, info) -> a score, or the reason why there is none.

`messages` is the dialogue up to a policy turn, whose message is the last. A rule's parameters:
`rule:length?max_words=50`. No torch here: ranking by rule starts in a fraction of a second.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.environments import guessing_game
from pipeline.errors import DataError
from pipeline.records import Message
from pipeline.rewards.base import Settings
from pipeline.rewards.functions import FunctionReward, digest
from pipeline.rewards.parameters import convert, read_query
from pipeline.thoughts import spoken

Rule = Callable[..., float | str]

# A minus sign counts only where it can't be a dash or a subtraction: "3-4" ends with 4; a comma
# only before three digits. No part matches in two ways: hostile texts take linear time too.
_NUMBER = re.compile(
    r"(?:(?<![\w.)}])-)?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\w)|/\d+)?"
)
# What Fraction may read: it computes any power of ten, and that of 1e999999999 fills the memory.
_PLAIN_NUMBER = re.compile(r"[-+]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?|\d+/\d+)")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_MINUS = "\u2212"


def guessing_game_rule(messages: Sequence[Message], info: dict[str, Any]) -> float | str:
    """Score how far the interval that is still possible has shrunk, 0..1."""
    if not all(isinstance(info.get(name), int) for name in ("low", "secret", "high")):
        return "no_game"
    if not (info["low"] <= info["secret"] <= info["high"] and info["low"] < info["high"]):
        return "no_game"
    said = [spoken(message) for message in messages if message.get("role") == "assistant"]
    return guessing_game.score(info, said)


def final_answer_rule(messages: Sequence[Message], info: dict[str, Any]) -> float | str:
    r"""Score 1 where the message's answer equals `info["answer"]`, else 0.

    The answer is what the last \boxed{} holds, or the number after the last "####", or the last
    number; `info["answer"]` is what its \boxed{} holds, or what follows "####", or all of it.
    "1,000", "1000.0", "$1000" and "1e3" are equal; so are "1/2", "0.5" and \frac{1}{2}; "50%" is
    50.
    """
    if info.get("answer") is None:
        return "no_answer"
    wanted = str(info["answer"])
    boxed = _boxed(wanted)
    wanted = wanted.rpartition("####")[2] if boxed is None else boxed
    found = answer_of(spoken(messages[-1]))
    return float(found is not None and _value(found) == _value(wanted))


def length_rule(
    messages: Sequence[Message], info: dict[str, Any], min_words: int = 1, max_words: int = 200
) -> float:
    """Score 1 where the message has min_words to max_words words, else 0."""
    return float(min_words <= len(spoken(messages[-1]).split()) <= max_words)


def format_rule(
    messages: Sequence[Message], info: dict[str, Any], pattern: str = r"####\s*\S"
) -> float | str:
    """Score 1 where the message matches `info["format"]` (a regular expression) or `pattern`."""
    try:
        found = re.search(info.get("format") or pattern, spoken(messages[-1]))
    except (re.error, TypeError):
        return "bad_format"  # the row's own; `pattern` was checked at the start
    return float(found is not None)


RULES: dict[str, Rule] = {
    "guessing_game": guessing_game_rule,
    "final_answer": final_answer_rule,
    "length": length_rule,
    "format": format_rule,
}


def load(spec: str, settings: Settings) -> FunctionReward:
    """Make the reward of `rule:<name>` or `rule:<name>?<parameter>=<value>&...`."""
    return FunctionReward(spec, fingerprint(spec), _rule(spec))


def fingerprint(spec: str) -> str:
    """Hash the spec and the rules' own code: another rule is another reward.

    Raises DataError where there is no such rule, before an output is begun under its name.
    """
    _rule(spec)
    return digest(spec.encode(), Path(__file__).read_bytes())


def _rule(spec: str) -> Rule:
    name, _, query = spec.removeprefix("rule:").partition("?")
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1)
        raise DataError(
            f"there is no rule {name!r}{f', did you mean {near[0]!r}?' if near else ';'}"
            f" there are: {', '.join(RULES)}"
        )
    given = convert(spec, RULES[name], read_query(spec, query))
    try:
        re.compile(given.get("pattern", ""))
    except re.error as error:
        raise DataError(f"{spec!r}: no regular expression: {error}") from None
    return partial(RULES[name], **given)


def answer_of(text: str) -> str | None:
    r"""Return what the last \boxed{} of a text holds, or its number (see final_answer_rule)."""
    if (boxed := _boxed(text)) is not None:
        return boxed
    text = text.replace(_MINUS, "-")
    marked = _NUMBER.search(text, text.rfind("####") + 4) if "####" in text else None
    if marked is not None:
        return marked[0]
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
    bare = answer.replace(_MINUS, "-").replace("{,}", ",")
    bare = re.sub(r"\\[,!;: ]|\\?[$%]|\s", "", bare).rstrip(".")
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare)
    if found := _FRACTION.fullmatch(bare):
        bare = "{}{}/{}".format(*found.groups())
    try:
        return Fraction(bare) if _PLAIN_NUMBER.fullmatch(bare) else bare
    except (ValueError, ZeroDivisionError):
        return bare  # more digits than Python reads, or x/0: equal only to the same text
