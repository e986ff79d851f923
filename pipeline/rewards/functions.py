"""Rewards that are functions: the built-in rules' runner, and `python:file.py:function`.

A function gets the dialogue up to a policy turn (a list of message dicts, the policy's last) and
the rollout's `info`; it returns a finite number, or a string: the reason why there is no score.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.records import Rollout
from pipeline.rewards.base import Scored, Settings, blank, prefix, require_finite

Function = Callable[[list[Any], dict[str, Any]], float | str]


class FunctionReward:
    """Scores each asked prefix with one call of a function."""

    reads_reply = False
    parallel = 1  # a user's function need not bear threads

    def __init__(self, name: str, fingerprint: str, function: Function) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self._function = function

    def score(self, rollouts: Sequence[Rollout], turns: Sequence[Sequence[int]]) -> list[Scored]:
        """Call the function on each asked prefix; its exceptions stop the stage, with the row."""
        results = []
        for rollout, asked in zip(rollouts, turns, strict=True):
            scored, scorable = blank(rollout, asked)
            for turn in scorable:
                scored.rewards[turn], scored.errors[turn] = self._call(rollout, turn)
            results.append(scored)
        return results

    def _call(self, rollout: Rollout, turn: int) -> tuple[float | None, str | None]:
        # Copies: a function that edits its arguments must not change what is written.
        messages: list[Any] = [dict(message) for message in prefix(rollout, turn)]
        try:
            value = self._function(messages, dict(rollout.info))
        except Exception as error:
            error.add_note(
                f"{self.name} failed on prompt_id {rollout.prompt_id!r}, sample {rollout.sample},"
                f" policy turn {turn}"
            )
            raise
        if isinstance(value, str):
            return None, value
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(
                f"{self.name} returned {value!r} for prompt_id {rollout.prompt_id!r}, policy turn"
                f" {turn}; return a number, or a string: the reason why there is no score"
            ) from None
        return require_finite(number, self.name, rollout, turn), None


def load(spec: str, settings: Settings) -> FunctionReward:
    """Load `python:path.py:function`."""
    path, name = _parse(spec)
    module_spec = importlib.util.spec_from_file_location(f"turnwise_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{spec!r}: {path} defines no function {name!r}")
    return FunctionReward(spec, fingerprint(spec), function)


def fingerprint(spec: str) -> str:
    """Hash the function's name and file: an edited function is another reward."""
    path, name = _parse(spec)
    return digest(name.encode(), path.read_bytes())


def digest(*parts: bytes) -> str:
    """Return a short hash of some bytes, each part with its length."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(f"{len(part)}:".encode())
        hashed.update(part)
    return hashed.hexdigest()[:16]


def _parse(spec: str) -> tuple[Path, str]:
    path, colon, name = spec.removeprefix("python:").rpartition(":")
    if not colon or not name.isidentifier() or not path.endswith(".py"):
        raise DataError(f"write python:path/to/file.py:function, not {spec!r}")
    if not Path(path).is_file():
        raise DataError(f"{spec!r}: there is no file {path}")
    return Path(path), name
