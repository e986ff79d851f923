"""Counts of tokens, the live line, and what a dry run says."""

import asyncio
import time
from collections import Counter

import pytest

from pipeline.engines.base import Usage
from pipeline.estimate import Probe, Work, report, spread, work_of
from pipeline.meter import Meter, Progress, clock, shown
from pipeline.plans import Plan
from pipeline.records import Prompt


def test_costs_are_by_party_and_by_rollout_and_a_trunk_is_sample_zeros():
    meter = Meter()
    meter.count("policy", ("p", 0, 0), Usage(10, 3))
    meter.count("user", ("p", 0, 1), Usage(20, 4, 16))
    meter.count("policy", ("p", 1, 1), Usage(17, 2))
    meter.carry(("p", 1), {"policy": {"requests": 5, "tokens_in": 100, "tokens_out": 50}})
    assert meter.total == {
        "policy": {"requests": 2, "tokens_in": 27, "tokens_out": 5},
        "user": {"requests": 1, "tokens_in": 20, "tokens_out": 4, "tokens_cached": 16},
    }
    assert meter.take(("p", 0))["user"]["tokens_cached"] == 16
    assert meter.take(("p", 1)) == {"policy": {"requests": 6, "tokens_in": 117, "tokens_out": 52}}
    assert meter.take(("p", 1)) == {}


def test_the_line_tells_dialogues_rates_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter()
    progress = Progress(2000, 400, meter, lambda: 512, done=1, failed=0)
    progress.start()
    assert progress.line() == "1 of 2,000 dialogues · 512 in flight · 0 failed"
    for n in range(100):
        meter.count("policy", ("p", n, 0), Usage(10, 30))
    meter.count("user", ("p", 0, 0), Usage(10, 55))
    now[0] += 10
    # 100 of 400 turns in 10 s: 30 s are left.
    assert progress.line() == (
        "1 of 2,000 dialogues · 512 in flight · 0 failed · policy 300 tok/s · user 6 tok/s"
        " · 0:30 left"
    )
    progress.skip(200)
    now[0] += 10
    assert progress.line().endswith("policy 150 tok/s · user 3 tok/s · 0:20 left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3600, "1:00:00"), (36061, "10:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_in_a_log_the_line_comes_at_the_end_and_finished_rows_are_forced_to_disk(
    monkeypatch, capsys
):
    monkeypatch.setattr("pipeline.meter._SYNC_S", 0.01)
    synced = []

    async def block():
        async with shown(lambda: "the line", lambda: synced.append(1)):
            await asyncio.sleep(0.1)

    asyncio.run(block())
    assert capsys.readouterr().err == "the line\n"
    assert len(synced) > 2


def test_a_disk_that_fails_is_no_secret(monkeypatch):
    monkeypatch.setattr("pipeline.meter._SYNC_S", 0.01)

    def sync():
        raise OSError("no space left")

    async def block():
        async with shown(lambda: "the line", sync):
            await asyncio.sleep(0.1)

    with pytest.raises(OSError, match="no space left"):
        asyncio.run(block())


def test_work_is_added_up_by_hand():
    """h=1, L=2: trunk of 1 turn, 2 x 2 turns; replies: 1 before the fork, 1 in each branch."""
    plans = [Plan(2, 1, 2), Plan(3, None, 1)]
    full = lambda plan: plan.score_turn + 1  # noqa: E731
    assert work_of(plans, full, last_reply=False) == Work(2, 5, 5 + 6, 3 + 3)
    assert work_of(plans, full, last_reply=True) == Work(2, 5, 5 + 6, 3 + 3 + 5)


def test_the_report_reckons_from_the_probe():
    spent = {
        "policy": Counter(requests=10, tokens_in=1000, tokens_out=500),
        "user": Counter(requests=8, tokens_in=800, tokens_out=160),
    }
    lines = report(Work(500, 1000, 2000, 1600), Probe(4, 12, spent, 3.0), concurrency=100)
    assert lines == [
        "500 prompts make 1,000 rollouts: at the most 2,000 policy turns and 1,600 replies",
        "the probe played 4 rollouts in 0:03",
        "policy: 50 tokens a turn, so about 100,000 to sample and 200,000 of context to read",
        "user: 20 tokens a turn, so about 32,000 to sample and 160,000 of context to read",
        "time: about 10:00 at the probe's pace; 0:24 if 100 dialogues in flight are no slower each",
    ]


def test_the_probe_is_spread_over_the_prompts():
    prompts = [Prompt(str(n), []) for n in range(100)]
    assert [p.prompt_id for p in spread(prompts, 100, 4)] == ["0", "25", "50", "75"]
    assert [p.prompt_id for p in spread(prompts[:3], 3, 16)] == ["0", "1", "2"]
