"""An event loop in a thread of its own, for threads that wait for what servers answer."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from pipeline.errors import EngineError

T = TypeVar("T")


class Background:
    """Runs coroutines for any number of threads until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, steps: Coroutine[Any, Any, T]) -> T:
        """Return what `steps` returns; raise what it raises, EngineError when it is called off."""
        # Under the lock: what is submitted to a loop that has stopped would never end.
        with self._lock:
            if self._closed:
                steps.close()
                raise EngineError("the servers are closed")
            future = asyncio.run_coroutine_threadsafe(steps, self._loop)
            self._under_way.add(future)
        try:
            return future.result()
        except CancelledError:
            raise EngineError("a request was called off") from None
        finally:
            with self._lock:
                self._under_way.discard(future)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Call off what is under way, run `last`, and end the thread."""
        with self._lock:
            assert not self._closed, "closed twice"
            self._closed = True
            waited_for = list(self._under_way)
        for future in waited_for:
            future.cancel()
        asyncio.run_coroutine_threadsafe(self._end(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, last: Coroutine[Any, Any, None]) -> None:
        await last
        await self._loop.shutdown_default_executor()
