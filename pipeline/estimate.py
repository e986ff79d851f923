"""What a run of generate would take: rows, turns and tokens, and a time from a short probe."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.admission import play_all
from pipeline.meter import Spent, clock
from pipeline.plans import Plan
from pipeline.records import Prompt, Rollout
from pipeline.rollout import Job, Table, turns_of

PROBE_PROMPTS = 16


@dataclass(frozen=True)
class Work:
    """How much a run plays at the most. `replies`: what the environment says between turns."""

    prompts: int
    rollouts: int
    turns: int
    replies: int


def work_of(plans: Iterable[Plan], turns_of_plan: Callable[[Plan], int], last_reply: bool) -> Work:
    """Add up what plans ask for when no dialogue ends early; a trunk is played once."""
    prompts = rollouts = turns = replies = 0
    for plan in plans:
        fork, full = plan.branch_turn or 0, turns_of_plan(plan)
        prompts += 1
        rollouts += plan.samples
        turns += fork + plan.samples * (full - fork)
        # A branch answers the turns after its fork's; the trunk those before, the fork's included.
        replies += fork + plan.samples * (full - fork - 1 + last_reply)
    return Work(prompts, rollouts, turns, replies)


@dataclass(frozen=True)
class Probe:
    """What a few prompts took: dialogues in flight together, policy turns, costs and seconds."""

    rollouts: int
    turns: int
    spent: Spent
    seconds: float


def spread(prompts: Iterable[Prompt], total: int, count: int) -> list[Prompt]:
    """Take `count` of `total` prompts, evenly spread over them."""
    wanted = {i * total // count for i in range(count)}
    return [prompt for i, prompt in enumerate(prompts) if i in wanted]


async def probe(jobs: Sequence[Job], table: Table, spent: Spent, concurrency: int) -> Probe:
    """Play a few prompts and keep nothing of it but what it took."""
    finished: list[Rollout] = []
    began = time.monotonic()
    await play_all(jobs, replace(table, finished=finished.append), concurrency)
    seconds = time.monotonic() - began
    return Probe(len(finished), sum(len(turns_of(r)) for r in finished), spent, seconds)


def report(work: Work, probed: Probe, concurrency: int) -> list[str]:
    """Return the lines that `--dry_run` prints.

    Two times bracket the run: the probe's pace, and that pace times as many more dialogues as are
    in flight together, as if an engine with room took them for free.
    """
    lines = [
        f"{work.prompts:,} prompts make {work.rollouts:,} rollouts: at the most {work.turns:,} "
        f"policy turns and {work.replies:,} replies",
        f"the probe played {probed.rollouts:,} rollouts in {clock(probed.seconds)}",
    ]
    played = probed.spent.get("policy", Counter())["requests"]
    if not played:
        return [*lines, "it came to no policy turn, so there is nothing to reckon with"]
    scale = work.turns / played
    for party, counts in probed.spent.items():
        out, into = counts["tokens_out"] * scale, counts["tokens_in"] * scale
        each = counts["tokens_out"] / counts["requests"]
        lines.append(
            f"{party}: {each:,.0f} tokens a turn, so about {out:,.0f} to sample and {into:,.0f} "
            "of context to read"
        )
    slow = probed.seconds * scale
    together = min(concurrency, work.rollouts) / max(min(concurrency, probed.rollouts), 1)
    lines.append(
        f"time: about {clock(slow)} at the probe's pace; {clock(slow / max(together, 1.0))} if "
        f"{min(concurrency, work.rollouts):,} dialogues in flight are no slower each"
    )
    return lines
