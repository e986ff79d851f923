"""Parameters of a reward that is a function: what follows the `?` of `rule:NAME?max_words=50`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from pipeline.errors import DataError

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_query(spec: str, query: str) -> dict[str, str]:
    """Read `name=value&name=value`; %XX stands for a character, + for itself (as in a pattern)."""
    given: dict[str, str] = {}
    for item in query.split("&") if query else []:
        name, equals, value = item.partition("=")
        if not equals or not name or name in given:
            what = "occurs twice" if name in given else "isn't name=value"
            raise DataError(f"{spec!r}: {item!r} {what}; write ?name=value&name=value")
        given[unquote(name)] = unquote(value)
    return given


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a function's parameters by name; none for those of C that don't tell."""
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}


def convert(
    spec: str, function: Callable[..., Any], given: Mapping[str, str], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Give each parameter the type of its default. `others`: names to tell of besides.

    Raises DataError for a name that the function doesn't have, and for a value that doesn't fit.
    """
    known = {
        name: parameter.default
        for name, parameter in parameters_of(function).items()
        if parameter.default is not inspect.Parameter.empty
    }
    if unknown := given.keys() - known.keys():
        raise DataError(
            f"{spec!r}: no parameter {', '.join(sorted(unknown))};"
            f" there are: {', '.join([*known, *others]) or 'none'}"
        )
    try:
        return {name: _converted(known[name], value) for name, value in given.items()}
    except ValueError as error:
        raise DataError(f"{spec!r}: {error}") from None


def _converted(default: Any, value: str) -> Any:
    if isinstance(default, bool):
        if value.lower() not in _BOOLEANS:
            raise ValueError(f"{value!r} is neither true nor false")
        return _BOOLEANS[value.lower()]
    if default is None or isinstance(default, str):
        return value
    if isinstance(default, int | float):
        return type(default)(value)
    raise ValueError(f"a parameter whose default is {default!r} can't be given as text")
