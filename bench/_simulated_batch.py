"""An engine's batch and its prefix cache in simulated time: no clock, no network, no model.

A request waits until one of the slots is free (first come, first served), reads those ids of its
context that aren't cached, and then says one id a step. Contexts are read one after the other, and
nobody speaks meanwhile: reading is bound by arithmetic, of which an engine has so much a second. A
step takes longer the more slots are busy. Times are seconds of whatever clock the caller passes in;
they may be passed in late, and the batch has then done at the right moments what was due until
then.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK = 16
"""Ids of a block of the prefix cache; vLLM's default."""


@dataclass(frozen=True)
class Costs:
    """What an engine's work takes: 0 is nothing. Real seconds are these divided by `time_scale`."""

    prefill_ids_per_s: float = 0.0
    """Uncached ids that the engine reads in a second; 0: as many as there are."""
    step_s: float = 0.0
    """An id of one slot, alone in the batch."""
    row_s: float = 0.0
    """What each busy slot adds to a step."""
    time_scale: float = 1.0

    def prefill(self, ids: int) -> float:
        """Return the seconds of reading so many ids."""
        if not self.prefill_ids_per_s:
            return 0.0
        return ids / self.prefill_ids_per_s / self.time_scale

    def step(self, busy: int) -> float:
        """Return the seconds of a step of `busy` slots."""
        return (self.step_s + self.row_s * busy) / self.time_scale


class PrefixCache:
    """Blocks of ids under a hash of everything before them; the least recently used go first."""

    def __init__(self, blocks: int) -> None:
        """Hold so many blocks at the most."""
        self.blocks = blocks
        self._held: OrderedDict[int, None] = OrderedDict()

    def read(self, ids: np.ndarray) -> int:
        """Take in a context; return how many of its ids were there. The last one never is: vLLM
        computes it anew, for there is nothing else to sample from.
        """
        keys = self._keys(ids)
        whole = (len(ids) - 1) // BLOCK
        hits = sum(1 for _ in itertools.takewhile(self._held.__contains__, keys[:whole]))
        self._hold(keys)
        return hits * BLOCK

    def write(self, ids: np.ndarray) -> None:
        """Take in a context and what was said after it."""
        self._hold(self._keys(ids))

    def _keys(self, ids: np.ndarray) -> list[int]:
        data, width = ids.astype(np.int64).tobytes(), BLOCK * 8
        keys, key = [], 0
        for start in range(0, len(data) - width + 1, width):
            key = hash((key, data[start : start + width]))
            keys.append(key)
        return keys

    def _hold(self, keys: list[int]) -> None:
        # Backwards: of one context its last blocks are the first to go.
        for key in reversed(keys):
            self._held[key] = None
            self._held.move_to_end(key)
        while len(self._held) > self.blocks:
            self._held.popitem(last=False)


@dataclass(eq=False)
class Job:
    """A request in the batch: `steps` ids to say, after `prefill()` seconds of reading.

    `prefill` is called when the job gets its slot, because what is cached is known only then.
    """

    steps: int
    prefill: Callable[[], float]
    owner: Any = None
    state: str = field(default="waiting", init=False)
    left_to_read_s: float = field(default=0.0, init=False)


class Batch:
    """A bounded batch. `advance` moves its time; what `submit` adds starts at that time."""

    def __init__(self, slots: int, costs: Costs) -> None:
        """Start empty at time 0."""
        self.slots, self.costs = slots, costs
        self.time_s = 0.0
        self.busy = 0
        self.peak_busy = 0
        self.busy_slot_s = 0.0
        self.waiting: deque[Job] = deque()
        self._steps_done = 0.0
        self._order = itertools.count()
        self._reading: deque[Job] = deque()
        self._saying: list[tuple[float, int, Job]] = []  # until so many steps are done

    def submit(self, job: Job) -> None:
        """Queue a job at the batch's present time."""
        self.waiting.append(job)
        self._admit()

    def cancel(self, job: Job) -> None:
        """Forget a job whose owner is gone; its slot is free at once."""
        if job.state == "waiting":
            self.waiting.remove(job)
        elif job.state == "running":
            self.busy -= 1
        job.state = "cancelled"
        self._admit()

    def next_event(self) -> float:
        """Return when something happens next if nothing is submitted before; inf for never."""
        while self._reading and self._reading[0].state == "cancelled":
            self._reading.popleft()
        if self._reading:
            return self.time_s + self._reading[0].left_to_read_s
        while self._saying and self._saying[0][2].state == "cancelled":
            heapq.heappop(self._saying)
        if not self._saying:
            return math.inf
        left = self._saying[0][0] - self._steps_done
        return self.time_s + left * self.costs.step(self.busy)

    def advance(self, until_s: float) -> list[Job]:
        """Move to `until_s`; return the jobs that were finished on the way, in order."""
        finished: list[Job] = []
        while (event := self.next_event()) <= until_s:
            self._pass(event)
            if self._reading:
                self._begin_to_say(self._reading.popleft())
                continue
            self._steps_done, _, job = heapq.heappop(self._saying)
            job.state = "finished"
            finished.append(job)
            self.busy -= 1
            self._admit()
        self._pass(until_s)
        return finished

    def _pass(self, until_s: float) -> None:
        passed = max(until_s - self.time_s, 0.0)
        self.time_s += passed
        self.busy_slot_s += self.busy * passed
        if self._reading:
            self._reading[0].left_to_read_s -= passed
        elif self._saying and passed:
            self._steps_done += passed / self.costs.step(self.busy)

    def _admit(self) -> None:
        while self.waiting and self.busy < self.slots:
            job = self.waiting.popleft()
            job.state = "running"
            self.busy += 1
            self.peak_busy = max(self.peak_busy, self.busy)
            job.left_to_read_s = job.prefill()
            self._reading.append(job)

    def _begin_to_say(self, job: Job) -> None:
        heapq.heappush(self._saying, (self._steps_done + job.steps, next(self._order), job))
