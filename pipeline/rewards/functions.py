"""Rewards that are functions: the built-in rules' runner, and `python:file.py:function`.

A function gets the dialogue up to a policy turn (a list of message dicts, the policy's last) and
the rollout's `info`; it returns a finite number, or a string: the reason why there is no score.
With `?scope=dialogue` it is called once for a rollout, and may say something of each turn. The
README has the whole contract; returns.py reads what comes back.
"""

import copy
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.records import RewardPart, Rollout
from pipeline.rewards import returns
from pipeline.rewards.base import Scored, Settings, blank, prefix
from pipeline.rewards.parameters import convert, parameters_of, read_query

Function = Callable[..., Any]

_SPEC = re.compile(r"python:(?P<path>.+?\.py):(?P<name>[^\W\d]\w*)(?:\?(?P<query>.*))?", re.DOTALL)
_SCOPES = ("turn", "dialogue")


class FunctionReward:
    """Scores each asked prefix with one call of a function."""

    reads_reply = False
    parallel = 1  # a user's function need not bear threads

    def __init__(self, name: str, fingerprint: str, function: Function) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self._function = function
        self._reads_tools = "tools" in parameters_of(function)

    def score(self, rollouts: Sequence[Rollout], turns: Sequence[Sequence[int]]) -> list[Scored]:
        """Call the function on each asked prefix; its exceptions stop the stage, with the row."""
        return [self._score(*item) for item in zip(rollouts, turns, strict=True)]

    def _score(self, rollout: Rollout, asked: Sequence[int]) -> Scored:
        scored, scorable = blank(rollout, asked)
        for turn in scorable:
            value, parts = returns.of_turn(self._call(rollout, turn), self._where(rollout, turn))
            _put(scored, turn, value)
            for name, part in parts.items():
                _part(scored, name, part.kind).values[turn] = part.values[0]
        return scored

    def _call(self, rollout: Rollout, turn: int) -> Any:
        # Copies: a function that edits its arguments must not change what is written.
        messages = [_copied(message) for message in prefix(rollout, turn)]
        more = {"tools": json.loads(rollout.tools or "null")} if self._reads_tools else {}
        try:
            return self._function(messages, _copied(rollout.info), **more)
        except Exception as error:
            error.add_note(f"{self._where(rollout, turn)} failed")
            raise

    def _where(self, rollout: Rollout, turn: int) -> str:
        return (
            f"{self.name} on prompt_id {rollout.prompt_id!r}, sample {rollout.sample}, policy turn"
            f" {turn}"
        )


class DialogueReward(FunctionReward):
    """Scores a rollout with one call of a function, which sees the dialogue to its score turn.

    The score turn is the last that counts, so a score is the same whichever turns are asked for.
    """

    def _score(self, rollout: Rollout, asked: Sequence[int]) -> Scored:
        scored, scorable = blank(rollout, asked)
        last = max((turn for turn in asked if turn <= rollout.score_turn), default=-1)
        if last not in scorable:
            return scored
        returned, where = self._call(rollout, last), self._where(rollout, last)
        values, parts = returns.of_dialogue(returned, last + 1, where)
        counted = [turn for turn in scorable if turn <= last]
        for turn in counted:
            _put(scored, turn, values[turn])
        for name, part in parts.items():
            for turn in counted:
                _part(scored, name, part.kind).values[turn] = part.values[turn]
        return scored


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    # deepcopy of a flat mapping takes ten times as long, and most of a rule's time.
    nested = {name: copy.deepcopy(v) for name, v in values.items() if isinstance(v, list | dict)}
    return {**values, **nested}


def _put(scored: Scored, turn: int, value: returns.Value) -> None:
    if isinstance(value, str):
        scored.errors[turn] = value
    else:
        scored.rewards[turn] = value


def _part(scored: Scored, name: str, kind: str) -> RewardPart:
    for part in scored.parts:
        if (part.name, part.kind) == (name, kind):
            return part
    scored.parts.append(RewardPart(name, kind, [None] * len(scored.rewards)))
    return scored.parts[-1]


def load(spec: str, settings: Settings) -> FunctionReward:
    """Load `python:path.py:function`, with `?scope=dialogue` and parameters of the function's."""
    kind, function = _loaded(spec, _digest(spec))
    return kind(spec, _digest(spec), function)


def fingerprint(spec: str) -> str:
    """Hash the function's name, parameters and file: an edited function is another reward.

    Raises DataError for a spec that can't be loaded, before an output is begun under its name.
    """
    _loaded(spec, _digest(spec))
    return _digest(spec)


@lru_cache(maxsize=8)
def _loaded(spec: str, content: str) -> tuple[type[FunctionReward], Function]:
    """Run the file, once while its content is the same; return how the function is called."""
    parsed = _parse(spec)
    function = getattr(_module(parsed.path), parsed.name, None)
    if not callable(function) or inspect.iscoroutinefunction(function):
        what = "an async function" if callable(function) else "no function"
        raise DataError(
            f"{spec!r}: {parsed.path} defines {what} {parsed.name!r}; write a plain one"
        )
    given = dict(parsed.given)
    scope = given.pop("scope", "turn")
    if scope not in _SCOPES:
        raise DataError(f"{spec!r}: scope={scope!r}; there are: {', '.join(_SCOPES)}")
    function = partial(function, **convert(spec, function, given, others=("scope",)))
    _check_call(spec, function)
    return (DialogueReward if scope == "dialogue" else FunctionReward), function


def _module(path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"turnwise_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    # Registered before it runs: dataclasses look their own module up.
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    return module


def _check_call(spec: str, function: Function) -> None:
    """Refuse a function that can't be called with (messages, info), before any row is read."""
    more = {"tools": None} if "tools" in parameters_of(function) else {}
    try:
        inspect.signature(function).bind([], {}, **more)
    except TypeError as error:
        raise DataError(
            f"{spec!r} can't be called with (messages, info): {error}; give every other parameter a"
            " default, or name it tools"
        ) from None
    except ValueError:
        return


def _digest(spec: str) -> str:
    parsed = _parse(spec)
    given = json.dumps(parsed.given, sort_keys=True) if parsed.given else ""
    return digest((parsed.name + given).encode(), parsed.path.read_bytes())


def digest(*parts: bytes) -> str:
    """Return a short hash of some bytes, each part with its length."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(f"{len(part)}:".encode())
        hashed.update(part)
    return hashed.hexdigest()[:16]


class _Parsed(NamedTuple):
    path: Path
    name: str
    given: dict[str, str]


def _parse(spec: str) -> _Parsed:
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise DataError(f"write python:path/to/file.py:function?name=value, not {spec!r}")
    if not Path(found["path"]).is_file():
        raise DataError(f"{spec!r}: there is no file {found['path']}")
    return _Parsed(Path(found["path"]), found["name"], read_query(spec, found["query"] or ""))
