"""What a reward function returned: numbers, reasons and parts, or an error that names the row."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import DataError, EngineError
from pipeline.records import NO_SCORE

REASON_CHARS = 200
"""A reason is one line of at most so many characters; what is longer ends with an ellipsis."""
NAME_CHARS = 100
MOST = 1e100
"""The largest score: what is beyond would make means and spreads infinite."""

Value = float | str | None
"""A score, the reason why there is none, or neither."""
ItemT = TypeVar("ItemT")


class Part(NamedTuple):
    """A named part of a reward: "turn" with a value for each turn, or "outcome" with one."""

    kind: str
    values: list[float | None]


def of_turn(returned: Any, where: str) -> tuple[Value, dict[str, Part]]:
    """Read what a function returned for one turn: its score or reason, and parts of kind "turn".

    `where` names the function and the row, for errors: DataError for what is neither a number nor a
    reason, EngineError for NaN and infinity.
    """
    reward, parts = _opened(returned, where)
    named = {name: Part("turn", [_part(value, where)]) for name, value in parts.items()}
    return _score_or_reason(reward, where), named


def of_dialogue(returned: Any, turns: int, where: str) -> tuple[list[Value], dict[str, Part]]:
    """Read what a function returned for a dialogue: an entry for each turn, and its parts.

    One number or reason is the last turn's; a list has one entry for each turn, and its last one
    can't be None. The same holds for the parts: one number is an "outcome".
    """
    reward, parts = _opened(returned, where)
    whole = not isinstance(reward, list | tuple)
    entries = [None] * (turns - 1) + [reward] if whole else reward
    *earlier, last = _of_length(entries, turns, _score_or_none, where)
    if last is None:
        raise DataError(f"{where}: {_shown(returned)} has no entry for the last turn; {_EXPECTED}")
    return [*earlier, last], {name: _row(value, turns, where) for name, value in parts.items()}


_EXPECTED = (
    "return a number; a string, the reason why there is no score; or"
    ' {"reward": either of them, "parts": {name: number}}'
)


def _opened(returned: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """Return the reward and its parts, arrays and tensors as Python's own lists and numbers."""
    if not isinstance(returned, Mapping):
        return _plain(returned), {}
    parts = returned.get("parts") or {}
    if returned.keys() - {"reward", "parts"} or "reward" not in returned:
        keys = ", ".join(map(repr, returned))
        raise DataError(f"{where} returned a mapping with the keys {keys}; {_EXPECTED}")
    if not isinstance(parts, Mapping) or not all(map(_is_name, parts)):
        raise DataError(
            f"{where}: the parts {_shown(parts)} are no mapping of names (a line of text of at most"
            f" {NAME_CHARS} characters); {_EXPECTED}"
        )
    return _plain(returned["reward"]), {name: _plain(value) for name, value in parts.items()}


def _plain(value: Any) -> Any:
    # NumPy's and torch's scalars, arrays and tensors.
    return value.tolist() if hasattr(value, "tolist") else value


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= NAME_CHARS


def _of_length(
    entries: Sequence[Any], turns: int, read: Callable[[Any, str], ItemT], where: str
) -> list[ItemT]:
    if len(entries) != turns:
        raise DataError(
            f"{where} returned a list of {len(entries)}; it needs one entry for each of the"
            f" {turns} policy turns: a number, a reason, or None"
        )
    return [read(entry, where) for entry in entries]


def _row(value: Any, turns: int, where: str) -> Part:
    if isinstance(value, list | tuple):
        return Part("turn", _of_length(value, turns, _part, where))
    return Part("outcome", [*[None] * (turns - 1), _part(value, where)])


def _part(value: Any, where: str) -> float | None:
    return None if value is None else _number(_plain(value), where)


def _score_or_none(value: Any, where: str) -> Value:
    return None if value is None else _score_or_reason(_plain(value), where)


def _score_or_reason(value: Any, where: str) -> float | str:
    return _reason(value, where) if isinstance(value, str) else _number(value, where)


def _reason(text: str, where: str) -> str:
    """Return a reason as one bounded line that a table, a card and a terminal show as it is."""
    line = " ".join(text[: 20 * REASON_CHARS].split())
    if not line:
        raise DataError(f"{where} returned an empty reason; {_EXPECTED}")
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= REASON_CHARS else line[: REASON_CHARS - 1] + "…"


def _number(value: Any, where: str) -> float:
    if not isinstance(value, numbers.Real | Decimal):
        raise DataError(f"{where} returned {_shown(value)}; {_EXPECTED}")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.nan  # an int beyond float64, Decimal("sNaN")
    if not abs(number) <= MOST:
        raise EngineError(f"{where} returned {_shown(value)}: a fault of the function, not a score")
    if number == NO_SCORE:
        raise DataError(f"{where} returned {number:g}, which stands for no score; {_EXPECTED}")
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
