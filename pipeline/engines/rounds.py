"""Dispatch queued requests when every live dialogue waits, in key order.

So the batches of an in-process engine are a function of the input, never of timing: the same run
twice gives the same bytes on one machine. Engines that share a `Rounds` (policy and user model)
are dispatched together. A round runs in a thread of its own, so that the event loop can show
progress meanwhile, and hear Ctrl-C.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from pipeline.engines.base import Completion, Request

RunBatch = Callable[[Sequence[Request]], list[Completion]]


class _Entry(NamedTuple):
    run_batch: RunBatch
    request: Request
    future: asyncio.Future[Completion]


class Rounds:
    """Counts live dialogues and runs all that was submitted once each of them waits."""

    def __init__(self) -> None:
        self.live = 0
        self._scheduled = False
        self._queue: list[_Entry] = []
        self._thread: ThreadPoolExecutor | None = None

    def enter(self) -> None:
        """Count a dialogue in: no round starts before each of them waits or has left."""
        self.live += 1

    def leave(self) -> None:
        """Count a dialogue out."""
        self.live -= 1
        self._schedule()

    async def submit(self, run_batch: RunBatch, request: Request) -> Completion:
        """Wait for the round and return the completion."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._queue.append(_Entry(run_batch, request, future))
        self._schedule()
        return await future

    def _schedule(self) -> None:
        if not self._scheduled and self._queue and len(self._queue) >= self.live:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        if len(self._queue) < self.live:
            return
        queue, self._queue = self._queue, []
        # One thread: rounds never overlap, and torch keeps the threads that belong to it.
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="rounds")
        for run_batch in dict.fromkeys(entry.run_batch for entry in queue):
            entries = [entry for entry in queue if entry.run_batch == run_batch]
            entries.sort(key=lambda entry: entry.request.key)
            requests = [entry.request for entry in entries]
            loop = asyncio.get_running_loop()
            round_ = loop.run_in_executor(self._thread, run_batch, requests)
            round_.add_done_callback(partial(_hand_out, entries))


def _hand_out(entries: Sequence[_Entry], done: asyncio.Future[list[Completion]]) -> None:
    """Give each request its completion, or all of them the error that ended the round."""
    error = done.exception()
    completions: Sequence[Completion | None] = [None] * len(entries) if error else done.result()
    for entry, completion in zip(entries, completions, strict=True):
        if entry.future.done():  # whoever waited was cancelled
            continue
        if completion is None:
            assert error is not None
            entry.future.set_exception(error)
        else:
            entry.future.set_result(completion)
