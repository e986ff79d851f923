"""Dispatch queued requests when every live dialogue waits, in key order.

So the batches of an in-process engine are a function of the input, never of timing: the same run
twice gives the same bytes on one machine. Engines that share a `Rounds` (policy and user model)
are dispatched together.
"""

import asyncio
from collections.abc import Callable, Sequence

from pipeline.engines.base import Completion, Request

RunBatch = Callable[[Sequence[Request]], list[Completion]]


class Rounds:
    """Counts live dialogues and runs all that was submitted once each of them waits."""

    def __init__(self) -> None:
        self._live = 0
        self._scheduled = False
        self._queue: list[tuple[RunBatch, Request, asyncio.Future[Completion]]] = []

    def enter(self, dialogues: int = 1) -> None:
        """Count dialogues in: no round starts before each of them waits or has left."""
        self._live += dialogues

    def leave(self) -> None:
        """Count a dialogue out."""
        self._live -= 1
        self._schedule()

    async def submit(self, run_batch: RunBatch, request: Request) -> Completion:
        """Wait for the round and return the completion."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._queue.append((run_batch, request, future))
        self._schedule()
        return await future

    def _schedule(self) -> None:
        if not self._scheduled and self._queue and len(self._queue) >= self._live:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        if len(self._queue) < self._live:
            return
        queue, self._queue = self._queue, []
        for run_batch in dict.fromkeys(entry[0] for entry in queue):
            entries = [entry for entry in queue if entry[0] == run_batch]
            entries.sort(key=lambda entry: entry[1].key)
            _run(run_batch, entries)


def _run(
    run_batch: RunBatch, entries: list[tuple[RunBatch, Request, asyncio.Future[Completion]]]
) -> None:
    try:
        completions = run_batch([request for _, request, _ in entries])
    # Passed on to those who wait for it: a callback of the loop has no caller of its own.
    except Exception as error:  # noqa: BLE001
        for _, _, future in entries:
            future.set_exception(error)
        return
    for (_, _, future), completion in zip(entries, completions, strict=True):
        future.set_result(completion)
