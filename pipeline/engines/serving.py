"""What engines that speak HTTP share: which server a request goes to, and how often it is sent."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.engines.base import EngineOptions, Request
from pipeline.engines.routing import Router
from pipeline.engines.wire import LONGEST_PAUSE_S, Outage, Refusal, Wire, set_up_error
from pipeline.errors import EngineError, RequestFailed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """One server: its URL, to which an engine adds paths, its name for the model, its context."""

    url: str
    name: str
    max_context: int


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a request is sent, and the pauses between (s).

    They grow threefold: six attempts span a minute and a half, which a server's restart may take.
    """

    attempts: int = 6
    first_pause_s: float = 1.0

    def pause_s(self, failed: int, asked_s: float, draw: float) -> float:
        """Return the pause after `failed` attempts; `draw` in [0, 1) spreads those that failed
        together over a quarter more.
        """
        own = min(LONGEST_PAUSE_S, self.first_pause_s * 3.0 ** (failed - 1))
        return max(own, asked_s) * (1 + draw / 4)

    async def opening(self, send: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Send what checks a server at the start; raise EngineError when it keeps failing."""
        for failed in range(1, self.attempts + 1):
            try:
                return await send()
            except Outage as error:
                outage = error
            if failed < self.attempts:
                await asyncio.sleep(self.pause_s(failed, outage.asked_s, 0.0))
        raise EngineError(str(outage))


# Somebody waits before the screen, and a wrong URL is likelier than an outage.
OPENING = Retry(attempts=4, first_pause_s=0.5)


class Keeper(Protocol):
    """Keeps a server that the stage started; see supervision.py."""

    async def ready(self) -> Served:
        """Return the server, after its restart if need be. EngineError when there is no more."""
        ...

    async def is_gone(self, served: Served) -> bool:
        """Whether a server that failed is no more: exited, or replaced by another one."""
        ...

    def story(self, outage: str) -> str:
        """Return what its log says about an outage."""
        ...

    async def close(self) -> None:
        """End the server."""
        ...


class Line:
    """Brings requests to the servers of one party. `keeper` keeps the one server that is ours;
    `tell` shows a line when a server begins to fail.
    """

    def __init__(
        self,
        servers: Sequence[Served],
        wire: Wire,
        retry: Retry | None = None,
        keeper: Keeper | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        assert keeper is None or len(servers) == 1, "a keeper keeps one server"
        self.servers = tuple(servers)
        self.wire = wire
        self.keeper = keeper
        self._tell = tell
        self._retry = retry or Retry()
        self._router = Router(len(servers), self._retry.first_pause_s)

    @property
    def max_context(self) -> int:
        return min(server.max_context for server in self.servers)

    async def ask(self, request: Request, send: Callable[[Served], Awaitable[T]]) -> T:
        """Return what `send` returns for a server that answers.

        A repeated request is the same, seed included, so that it draws the same ids. Raises
        RequestFailed after the last attempt, EngineError where the set-up is wrong. Attempts
        count for each life of a server: waiting for a restart costs none.
        """
        failed, last = 0, None
        tried: int | None = None
        while True:
            n = self._router.pick(request.key[0], time.monotonic(), avoid=tried)
            tried = n
            try:
                served = await self.keeper.ready() if self.keeper else self.servers[n]
                failed, last = (0 if self.keeper and served is not last else failed), served
                sent_at = time.monotonic()
                answer = await send(served)
            except Outage as error:
                outage, failed = error, failed + 1
                if self._router.failed(n, time.monotonic(), outage.asked_s):
                    self._tell(f"{outage}; what it was asked is sent again")
            except Refusal as refusal:
                raise self._final(request, refusal, served) from None
            else:
                self._router.succeeded(n, sent_at)
                return answer
            finally:
                self._router.finished(n)
            if failed < self._retry.attempts:
                await self._pause(request, n, failed, outage)
            elif self.keeper is None or not await self.keeper.is_gone(served):
                text = f"{request.key}: failed {failed} times; the last time {outage}"
                text = self.keeper.story(text) if self.keeper else text
                raise RequestFailed("server_lost", text)

    async def close(self) -> None:
        """Drop the connections, and end the server if it is ours."""
        await self.wire.close()
        if self.keeper is not None:
            await self.keeper.close()

    async def _pause(self, request: Request, n: int, failed: int, outage: Outage) -> None:
        """Wait before the next attempt: for a moment where another server can take it."""
        # From the request's own seed: there is no other source of randomness.
        draw = random.Random(request.seed + failed).random()
        if self._router.has_another(n, time.monotonic()):
            await asyncio.sleep(self._retry.first_pause_s * draw)
        else:
            await asyncio.sleep(self._retry.pause_s(failed, outage.asked_s, draw))

    def _final(self, request: Request, refusal: Refusal, served: Served) -> EngineError:
        wrong = set_up_error(refusal, served.name, self.wire.key_env)
        return wrong or RequestFailed("server_refused", f"{request.key}: {refusal}")


def retry_of(options: EngineOptions) -> Retry:
    """Return the retry policy that a stage's options ask for."""
    return Retry(options.attempts)
