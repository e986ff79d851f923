"""What a simulated server says and when: answers drawn from seeds, a batch in real time."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from _simulated_batch import Batch, Costs, Job, PrefixCache

# An answer is sent this much before it is due at the most: a timer's wake-up is coarser than that.
EARLY_S = 1e-4


@dataclass(frozen=True)
class Settings:
    """What is served, and how fast."""

    port: int = 0
    model: str = "simulated"
    max_model_len: int = 8192
    ids_from: int = 32
    ids_to: int = 256
    corpus: str = ""
    opening_ids: str = ""
    opening_text: str = ""
    length_median: float = 16.0
    length_sigma: float = 0.0
    slots: int = 256
    cache_blocks: int = 65536
    prefill_ids_per_s: float = 0.0
    step_ms: float = 0.0
    row_ms: float = 0.0
    time_scale: float = 1.0


HELP = {
    "port": "0 takes a free one; the first line of output tells which",
    "model": "name to serve under",
    "max_model_len": "longest context and answer together, in ids",
    "ids_from": "first id that an answer is made of",
    "ids_to": "the id after the last one",
    "corpus": "an .npy of ids that answers are pieces of; without one they are drawn one by one",
    "opening_ids": "ids that every answer begins with, such as 12,7,99",
    "opening_text": "what every answer to a chat begins with",
    "length_median": "ids of an answer, its stop id included: the median",
    "length_sigma": "the standard deviation of the logarithm of an answer's length",
    "slots": "requests in the batch; others wait, first come, first served",
    "cache_blocks": "blocks of 16 ids in the prefix cache",
    "prefill_ids_per_s": "uncached ids that are read in a second; 0 reads in no time",
    "step_ms": "milliseconds of an id",
    "row_ms": "milliseconds that each busy slot adds to every id",
    "time_scale": "how many times faster than these latencies it really is",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said to a request, whenever that is."""

    ids: np.ndarray
    logprobs: list[float]
    finish_reason: str


def answer_to(body: dict[str, Any], context: np.ndarray, settings: Settings) -> Answer:
    """Draw an answer from the context, the seed and the sampling."""
    draw = _generator(body, context)
    opening = [int(i) for i in settings.opening_ids.split(",") if i]
    median, sigma = settings.length_median, settings.length_sigma
    length = round(median * float(np.exp(sigma * draw.standard_normal())))
    stops = body.get("stop_token_ids") or []
    wanted = max(length, len(opening) + 1)
    count = min(wanted, body["max_tokens"]) if stops else body["max_tokens"]
    if settings.corpus:
        text = _corpus(settings.corpus)
        start = int(draw.integers(len(text) - count))
        ids = text[start : start + count].copy()
    else:
        ids = draw.integers(settings.ids_from, settings.ids_to, count)
    ids[: len(opening)] = opening[:count]
    stopped = bool(stops) and wanted <= count
    if stopped:
        ids[-1] = stops[0]
    # Sixteenths: exact in binary and short in JSON.
    logprobs = (draw.integers(1, 64, count) / -16).tolist()
    return Answer(ids, logprobs, "stop" if stopped else "length")


@cache
def _corpus(path: str) -> np.ndarray:
    return np.load(path)


def _generator(body: dict[str, Any], context: np.ndarray) -> np.random.Generator:
    names = ("seed", "temperature", "top_p", "top_k", "min_p")
    told = json.dumps([body.get(name) for name in names]).encode()
    key = hashlib.blake2b(told + context.tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key)))


class Engine:
    """The batch in real time: a timer wakes it when something is due."""

    def __init__(self, settings: Settings) -> None:
        """Start idle; needs a running event loop."""
        costs = Costs(
            settings.prefill_ids_per_s,
            settings.step_ms / 1e3,
            settings.row_ms / 1e3,
            settings.time_scale,
        )
        self.batch = Batch(settings.slots, costs)
        self.cache = PrefixCache(settings.cache_blocks)
        self.totals = dict.fromkeys(("requests", "prompt_ids", "cached_ids", "response_ids"), 0)
        self.first_s, self.last_s = 0.0, 0.0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.batch.advance(self._loop.time())

    def submit(self, context: np.ndarray, answer: Answer, done: Callable[[int], None]) -> Job:
        """Play a request; `done(cached ids)` is called when it is finished."""
        self.first_s = self.first_s or self._loop.time()
        cached = 0

        def prefill() -> float:
            nonlocal cached
            cached = self.cache.read(context)
            return self.batch.costs.prefill(len(context) - cached)

        def finish() -> None:
            self.cache.write(np.concatenate([context, answer.ids]))
            counts = (1, len(context), cached, len(answer.ids))
            for name, count in zip(self.totals, counts, strict=True):
                self.totals[name] += count
            self.last_s = self._loop.time()
            done(cached)

        job = Job(len(answer.ids), prefill, finish)
        self._advance()
        self.batch.submit(job)
        self._wake()
        return job

    def cancel(self, job: Job) -> None:
        """Drop a request whose client is gone."""
        self._advance()
        if job.state in ("waiting", "running"):
            self.batch.cancel(job)
        self._wake()

    def stats(self) -> dict[str, Any]:
        """Return the totals: counts, slot-seconds that were busy, and times of the machine's
        monotonic clock. `cpu_s` is what this process took, not what it simulated.
        """
        self._advance()
        self._wake()
        batch = self.batch
        return self.totals | {
            "slots": batch.slots,
            "busy_slot_s": batch.busy_slot_s,
            "peak_busy": batch.peak_busy,
            "busy": batch.busy,
            "waiting": len(batch.waiting),
            "first_s": self.first_s,
            "last_s": self.last_s,
            "cpu_s": time.process_time(),
        }

    def _advance(self) -> None:
        for job in self.batch.advance(self._loop.time() + EARLY_S):
            job.owner()

    def _wake(self) -> None:
        """Set the timer for what is due next; what is due now is done now."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        while (due := self.batch.next_event()) <= self._loop.time() + EARLY_S:
            self._advance()
        if due < float("inf"):
            self._timer = self._loop.call_at(due, self._due)

    def _due(self) -> None:
        self._timer = None
        self._advance()
        self._wake()
