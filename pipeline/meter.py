"""What dialogues cost and how far they are: counted as it happens, shown as a line."""

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.engines.base import Completion, Engine, Request, Usage

_REFRESH_S = 0.5
_PLAIN_LINE_S = 30.0
_SYNC_S = 5.0
_WINDOW_S = 30.0

Spent = dict[str, Counter[str]]
"""By party: requests, tokens_in, tokens_out, and where the server says it tokens_cached."""


def add_spent(total: Spent, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add what was spent to a total, in place."""
    for party, counts in more.items():
        total.setdefault(party, Counter()).update(counts)


class Meter:
    """Counts requests and tokens of each party, in all and for each rollout under way."""

    def __init__(self) -> None:
        self.total: Spent = {}
        self._rollouts: dict[tuple[str, int], Spent] = {}

    def count(self, party: str, key: tuple[str, int, int], usage: Usage) -> None:
        """Count one completion for the rollout of a request's key."""
        counts = {
            "requests": 1,
            "tokens_in": usage.prompt_tokens,
            "tokens_out": usage.completion_tokens,
        }
        if usage.cached_tokens is not None:
            counts["tokens_cached"] = usage.cached_tokens
        add_spent(self.total, {party: counts})
        self.carry(key[:2], {party: counts})

    def carry(self, key: tuple[str, int], spent: Mapping[str, Mapping[str, int]]) -> None:
        """Count what a rollout has cost so far, in this run or an earlier one."""
        add_spent(self._rollouts.setdefault(key, {}), spent)

    def take(self, key: tuple[str, int]) -> Spent:
        """Return what a finished rollout has cost, and forget it. A trunk's cost is sample 0's."""
        return self._rollouts.pop(key, {})


class Metered:
    """An engine whose completions are counted for a party."""

    def __init__(self, engine: Engine, party: str, meter: Meter) -> None:
        self.engine = engine
        self.party = party
        self.meter = meter
        self.max_context = engine.max_context
        self.speaks = engine.speaks

    async def complete(self, request: Request) -> Completion:
        """See Engine."""
        said = await self.engine.complete(request)
        usage = said.usage or Usage(len(request.ids), len(said.ids))
        self.meter.count(self.party, request.key, usage)
        return said

    async def close(self) -> None:
        """See Engine."""
        await self.engine.close()


@dataclass
class Progress:
    """How far a run is. `turns`: policy turns that were left to play when it began."""

    rollouts: int
    turns: int
    meter: Meter
    in_flight: Callable[[], int]
    done: int = 0
    failed: int = 0
    _began: float = 0.0
    _seen: deque[tuple[float, dict[str, int]]] = field(default_factory=deque)

    def start(self) -> None:
        """Reckon from now: models are loaded, dialogues begin."""
        self._began = time.monotonic()

    def skip(self, turns: int) -> None:
        """Take turns that need not be played off what is left."""
        self.turns -= turns

    def line(self) -> str:
        """Return the state in one line: dialogues, tokens/s of each party, time left."""
        parts = [
            f"{self.done:,} of {self.rollouts:,} dialogues",
            f"{self.in_flight():,} in flight",
            f"{self.failed:,} failed",
            *(f"{party} {rate:,.0f} tok/s" for party, rate in self._rates().items()),
        ]
        left = self._seconds_left()
        return " · ".join(parts if left is None else [*parts, f"{clock(left)} left"])

    def _rates(self) -> dict[str, float]:
        """Return the tokens/s that each party sampled of late."""
        now = time.monotonic()
        self._seen.append((now, {p: n["tokens_out"] for p, n in self.meter.total.items()}))
        while len(self._seen) > 1 and self._seen[0][0] < now - _WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0][0], self._seen[0][1]
        if len(self._seen) == 1:
            since, before = self._began, {}
        return {
            party: (tokens - before.get(party, 0)) / max(now - since, 1e-9)
            for party, tokens in self._seen[-1][1].items()
        }

    def _seconds_left(self) -> float | None:
        played = self.meter.total.get("policy", Counter())["requests"]
        if not played:
            return None
        return (time.monotonic() - self._began) * max(self.turns - played, 0) / played


def clock(seconds: float) -> str:
    """Write a duration as 4:05 or 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@asynccontextmanager
async def shown(line: Callable[[], str], sync: Callable[[], None]) -> AsyncIterator[None]:
    """Show a line that changes while the block runs: live on a terminal, now and then in a log.

    `sync` is called every few seconds, and makes what is finished survive a power cut.
    """
    from rich.console import Console

    console = Console(stderr=True)
    ticking = asyncio.create_task(_live(line) if console.is_terminal else _plain(line))
    syncing = asyncio.create_task(_every(_SYNC_S, sync))
    try:
        yield
    finally:
        for task in (ticking, syncing):
            task.cancel()
        ended = await asyncio.gather(ticking, syncing, return_exceptions=True)
        print(line(), file=sys.stderr, flush=True)
        for error in ended:  # a disk that can't be written to, not the cancelling above
            if isinstance(error, Exception):
                raise error


async def _live(line: Callable[[], str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    with Live(Text(line()), console=console, auto_refresh=False, transient=True) as live:
        await _every(_REFRESH_S, lambda: live.update(Text(line()), refresh=True))


async def _plain(line: Callable[[], str]) -> None:
    await _every(_PLAIN_LINE_S, lambda: print(line(), file=sys.stderr, flush=True))


async def _every(seconds: float, call: Callable[[], Any]) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()
