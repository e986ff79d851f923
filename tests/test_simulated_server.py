"""The simulated server: its batch by hand, its answers, and our engine against it."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline.engines.base import EngineOptions, Request, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.engines.vllm import VllmEngine, open_engine

BENCH = Path(__file__).parents[1] / "bench"
# A benchmark's own modules lie beside it, as they do when it is run by its file.
sys.path.append(str(BENCH))

from _servers import simulated_server  # noqa: E402 - found by the path above
from _simulated_batch import BLOCK, Batch, Costs, Job, PrefixCache  # noqa: E402 - as above
from _simulated_engine import Settings, answer_to  # noqa: E402 - as above

STOP = 9


def job(name: str, steps: int, prefill_s: float = 0.0) -> Job:
    return Job(steps, lambda: prefill_s, name)


def request(ids: list[int], seed: int = 0, **sampling) -> Request:
    return Request(ids, seed, Sampling(**sampling), (STOP,), (f"prompt-{seed}", 0, 0))


def finish_times(batch: Batch) -> dict[str, float]:
    """Run a batch until nothing is due; return when each job was finished."""
    times: dict[str, float] = {}
    while (event := batch.next_event()) < float("inf"):
        times |= {done.owner: round(event, 9) for done in batch.advance(event)}
    return times


def test_slots_are_bounded_and_jobs_come_first_come_first_served():
    """Two slots, a step of 1 s: a ends at 2, so that c starts there; d follows b at 5."""
    batch = Batch(2, Costs(step_s=1.0))
    for name, steps in [("a", 2), ("b", 5), ("c", 4), ("d", 1)]:
        batch.submit(job(name, steps))
    assert (batch.busy, len(batch.waiting)) == (2, 2)
    assert finish_times(batch) == {"a": 2.0, "b": 5.0, "c": 6.0, "d": 6.0}
    assert (batch.busy_slot_s, batch.peak_busy, batch.busy) == (2 + 5 + 4 + 1, 2, 0)


def test_busy_slots_slow_each_other_down():
    """A step is 1 s and 0.5 s a busy slot. Together: 2 s a step, a ends at 4 with b's 2 of 4 steps
    done; alone 1.5 s a step, b ends at 7. Slot-seconds: 4 + 7.
    """
    batch = Batch(2, Costs(step_s=1.0, row_s=0.5))
    batch.submit(job("a", 2))
    batch.submit(job("b", 4))
    assert finish_times(batch) == {"a": 4.0, "b": 7.0}
    assert batch.busy_slot_s == 11.0


def test_reading_comes_before_saying_and_waking_late_changes_nothing():
    """a reads until 3 and says until 5; b waits for the slot. Whoever asks at 100 hears of both."""
    late = Batch(1, Costs(step_s=1.0))
    late.submit(job("a", 2, prefill_s=3.0))
    late.submit(job("b", 1, prefill_s=0.5))
    assert [done.owner for done in late.advance(100.0)] == ["a", "b"]
    assert (late.busy_slot_s, late.time_s) == (6.5, 100.0)


def test_contexts_are_read_one_after_the_other_and_nobody_speaks_meanwhile():
    """a reads until 2, b until 5, then both say an id a second: a's two until 7, b's one until 6.
    c is there from 6 on, for b's slot: it reads until 7, when a has its last id still to say.
    """
    batch = Batch(2, Costs(step_s=1.0))
    for name, steps, prefill_s in [("a", 2, 2.0), ("b", 1, 3.0), ("c", 1, 1.0)]:
        batch.submit(job(name, steps, prefill_s))
    assert finish_times(batch) == {"b": 6.0, "a": 8.0, "c": 8.0}


def test_time_scale_divides_every_latency():
    costs = Costs(prefill_ids_per_s=100.0, step_s=1.0, row_s=0.5, time_scale=10.0)
    assert (costs.prefill(50), costs.step(2)) == (0.05, 0.2)
    assert Costs().prefill(50) == 0.0


def test_a_cancelled_job_frees_its_slot():
    batch = Batch(1, Costs(step_s=1.0))
    one, two, three = job("one", 9), job("two", 9), job("three", 2)
    for each in (one, two, three):
        batch.submit(each)
    batch.advance(4.0)
    batch.cancel(two)
    batch.cancel(one)
    assert finish_times(batch) == {"three": 6.0}


def test_the_prefix_cache_counts_whole_blocks_and_forgets_the_oldest():
    cache = PrefixCache(4)
    ids = np.arange(3 * BLOCK, dtype=np.int32)
    assert cache.read(ids) == 0
    # The last id is always computed, so that the third block doesn't count.
    assert cache.read(ids) == 2 * BLOCK
    assert cache.read(np.append(ids, 1)) == 3 * BLOCK
    other = ids + 1000
    assert cache.read(other) == 0  # three blocks more: of the first context one is left
    assert cache.read(np.append(ids, 1)) == BLOCK
    cache = PrefixCache(4)
    cache.read(np.repeat([1, 2], BLOCK))
    assert cache.read(np.repeat([2, 1], BLOCK)) == 0  # blocks that are known, in another order
    assert cache.read(np.repeat([3, 2, 0], [BLOCK, BLOCK, 1])) == 0


@pytest.fixture(scope="module")
def server():
    with simulated_server("tiny", max_model_len=128, opening_ids="70,71", slots=4) as running:
        yield running


def opened(url: str) -> VllmEngine:
    """Attach to a server, with the probes that this takes."""
    return open_engine("tiny", None, EngineOptions(Rounds(), urls=(url,)))


def complete_all(url: str, requests: list[Request]):
    async def ask():
        engine = await asyncio.to_thread(opened, url)
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_our_engine_attaches_and_completes_through_it(server):
    said = complete_all(server.url, [request([1, 2, 3], seed) for seed in range(8)])
    for one in said:
        assert one.ids[:2] == [70, 71]
        assert one.ids[-1] == STOP and one.finish_reason == "stop"
        assert len(one.ids) == len(one.logprobs) == 16
        assert all(32 <= i < 256 for i in one.ids[:-1])
    assert len({tuple(one.ids) for one in said}) == 8
    assert opened(server.url).max_context == 128


def test_answers_depend_on_context_seed_and_sampling_alone(server):
    asked = request([1, 2, 3], 5)
    others = [request([1, 2, 4], 5), request([1, 2, 3], 6), request([1, 2, 3], 5, temperature=0.9)]
    first, *rest = complete_all(server.url, [asked, *others])
    assert complete_all(server.url, [*others, asked])[-1] == first
    assert all(other.ids != first.ids for other in rest)
    cut = complete_all(server.url, [request([1, 2, 3], 5, max_tokens=7)])[0]
    assert (cut.ids, cut.finish_reason) == (first.ids[:7], "length")


def test_lengths_are_log_normal():
    settings = Settings(length_median=50, length_sigma=0.5)
    bodies = [{"seed": seed, "stop_token_ids": [STOP], "max_tokens": 999} for seed in range(2000)]
    logs = np.log([len(answer_to(body, np.arange(3), settings).ids) for body in bodies])
    assert abs(np.median(logs) - np.log(50)) < 0.04
    assert abs(logs.std() - 0.5) < 0.03


def test_it_says_what_it_counted(server):
    before = server.stats()
    ids = [11] * (2 * BLOCK + 1)
    answers = [complete_all(server.url, [request(ids, 77)])[0] for _ in range(2)]
    after = server.stats()
    gained = {name: after[name] - before[name] for name in ("requests", "prompt_ids")}
    assert gained == {"requests": 2, "prompt_ids": 2 * len(ids)}  # without the probes
    assert after["cached_ids"] - before["cached_ids"] == 2 * BLOCK
    assert after["response_ids"] - before["response_ids"] == 2 * len(answers[0].ids)
    assert 0 < after["first_s"] < after["last_s"]
    assert (after["slots"], after["busy"], after["waiting"]) == (4, 0, 0)


def test_what_was_said_is_cached_for_the_next_turn(server):
    context = [13] * BLOCK
    said = complete_all(server.url, [request(context, 78)])[0].ids
    (later,) = complete_all(server.url, [request([*context, *said, 1], 79)])
    assert (len(said), later.usage.cached_tokens) == (BLOCK, 2 * BLOCK)


def test_usage_tells_cached_ids(server):
    body = {"model": "tiny", "prompt": [12] * (BLOCK + 1), "max_tokens": 3, "seed": 1}
    told = [
        httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False).json()["usage"]
        for _ in range(2)
    ]
    expected = {"prompt_tokens": 17, "completion_tokens": 3, "total_tokens": 20}
    assert told == [
        expected | {"prompt_tokens_details": {"cached_tokens": cached}} for cached in (0, BLOCK)
    ]


def test_latencies_pass_in_real_time():
    """One slot, 50 ms an id, four ids each: three requests take 0.6 s, whoever comes first."""
    with simulated_server("tiny", slots=1, step_ms=50, length_median=4) as server:
        complete_all(server.url, [request([1, 2], seed) for seed in range(3)])
        stats = server.stats()
    assert stats["busy_slot_s"] == pytest.approx(0.6, abs=0.001)
    assert 0.59 < stats["last_s"] - stats["first_s"] < 0.8
    assert stats["peak_busy"] == 1


def test_a_client_that_goes_away_frees_its_slot():
    with simulated_server("tiny", slots=1, step_ms=1000, length_median=1000) as server:
        body = {"model": "tiny", "prompt": [1], "max_tokens": 1000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3, trust_env=False)
        for _ in range(50):
            if (stats := server.stats())["busy"] == 0:
                break
        assert (stats["busy"], stats["requests"], stats["peak_busy"]) == (0, 0, 1)


def test_it_refuses_what_vllm_refuses(server):
    def status(path: str = "completions", **changes) -> int:
        body = {"model": "tiny", "prompt": [1], "max_tokens": 3} | changes
        return httpx.post(f"{server.url}/v1/{path}", json=body, trust_env=False).status_code

    assert status() == 200
    assert status(model="other") == 404
    assert status(prompt=[1] * 126) == 400
    assert status(prompt="text") == 400
    assert status("nowhere") == 404


def test_a_chat_is_answered_in_text():
    with simulated_server("tiny", opening_text="Question:", length_median=4) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "go on"}], "seed": 3}
        url = f"{server.url}/v1/chat/completions"
        one, two = (httpx.post(url, json=body, trust_env=False).json() for _ in range(2))
    choice = one["choices"][0]
    assert choice["message"]["content"].startswith("Question: w")
    assert (choice["finish_reason"], one["usage"]["completion_tokens"]) == ("stop", 4)
    assert choice == two["choices"][0]


def test_it_ends_on_sigterm():
    command = [sys.executable, str(BENCH / "_simulated_server.py"), "--model", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
