"""A run of generate: what is left to play, what is finished, what has failed, and its summary."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import EngineError
from pipeline.journal import Journal
from pipeline.meter import Meter, Progress, Spent, add_spent
from pipeline.plans import Plan
from pipeline.records import FAILURE, FINISH_REASONS, USER_RETRIES, Rollout
from pipeline.rollout import Job, turns_of, was_cut
from pipeline.rows import rollout_from_row, rollout_row
from pipeline.seeds import seed_for
from pipeline.shelf import Played, Shelf

_SPENT = "spent"
_BATCH_ROWS = 256
# A long dialogue that begins last is waited for when all others are done. Strictly longest first is
# worse: all of those want the user model at once, and leave it idle when the short ones come. Half
# the range of the draw was best in a model of two servers, whichever of them was the busier one.
LONG_FIRST = 0.5


@dataclass
class Summary:
    """Counts over the rollouts of a run, kept up as they are finished."""

    counts: Counter[str] = field(default_factory=Counter)
    spent: Spent = field(default_factory=dict)

    def add(self, record: Mapping[str, Any], sign: int = 1) -> None:
        """Count a journal's record, or take it off again (`sign` -1) when another replaces it."""
        info = _info(record)
        turns = record["turns"] or []
        reasons = [turn["finish_reason"] for turn in turns] or info.get(FINISH_REASONS, [])
        found = Counter(f"finish_{reason}" for reason in reasons)
        found[f"status_{record['status']}"] += 1
        found[f"end_{record['end_reason']}"] += 1
        found["response_ids"] = sum(len(turn["response_ids"]) for turn in turns)
        found["user_retries"] = sum(info.get(USER_RETRIES, {}).values())
        found["rollouts"] = 1
        for name, number in found.items():
            self.counts[name] += sign * number
        add_spent(
            self.spent,
            {
                party: {name: sign * number for name, number in counts.items()}
                for party, counts in record.get(_SPENT, {}).items()
            },
        )

    def nonzero(self) -> dict[str, int]:
        """Return the counts that aren't 0, by name."""
        return {name: n for name, n in sorted(self.counts.items()) if n}


class Generation:
    """The rollouts of a shelf's prompts: those in the journal, and those still to be played.

    `max_failed_share` of the rollouts may fail; one more stops the run, resumable.
    """

    def __init__(
        self,
        shelf: Shelf,
        journal: Journal,
        plan_of: Callable[[str], Plan],
        turns_of_plan: Callable[[Plan], int],
        max_failed_share: float,
        seed: int,
    ) -> None:
        self.shelf = shelf
        self.journal = journal
        self.plan_of = plan_of
        self.turns_of_plan = turns_of_plan
        self.max_failed_share = max_failed_share
        self.seed = seed
        self.summary = Summary()
        self.meter = Meter()
        self.in_flight: Callable[[], int] = lambda: 0
        self.progress = Progress(0, 0, self.meter, lambda: self.in_flight())
        self.prompts_left = 0
        self.longest = 1
        for place, record in journal.places():
            self._note(place, record)
        for prompt_id in shelf.ids():
            self._count(self.plan_of(prompt_id), shelf.played(prompt_id))
        self.progress.failed += self.summary.counts["status_failed"]

    def _rank(self, prompt_id: str) -> float:
        """Return where a prompt stands: its draw in 0..1, less up to LONG_FIRST for long plans."""
        draw = seed_for(self.seed, prompt_id, 0, 0, "order") / 2**63
        turns = self.turns_of_plan(self.plan_of(prompt_id))
        return draw - LONG_FIRST * turns / self.longest

    def _note(self, place: int, record: Mapping[str, Any]) -> None:
        info = _info(record)
        turns = len(record["turns"] or info.get(FINISH_REASONS, []))
        played = Played(record["sample"], place, turns, FAILURE in info)
        before = self.shelf.note(record["prompt_id"], played)
        if before is not None:
            assert before.cut, f"{record['prompt_id']}: a finished rollout was played again"
            self.summary.add(self.journal.read(before.place), -1)
        self.summary.add(record)

    def _count(self, plan: Plan, played: Sequence[Played]) -> None:
        """Count a prompt's rollouts, and the policy turns that are left to play."""
        self.progress.rollouts += len(played) if _ended(plan, played) else plan.samples
        cut = sum(rollout.cut for rollout in played)
        self.progress.done += len(played) - cut
        self.progress.failed -= cut  # they are played on
        if is_whole(plan, played):
            return
        self.prompts_left += 1
        fork, full = plan.branch_turn or 0, self.turns_of_plan(plan)
        self.longest = max(self.longest, full)
        turns = {rollout.sample: rollout.turns for rollout in played}
        self.progress.turns += max(0, fork - max(turns.values(), default=0))
        self.progress.turns += sum(full - max(fork, turns.get(s, 0)) for s in range(plan.samples))

    def jobs(self) -> Iterator[Job]:
        """Yield what is left to play, in a drawn order in which long dialogues tend to be early."""
        for prompt in self.shelf.by_rank(self._rank):
            plan, played = self.plan_of(prompt.prompt_id), self.shelf.played(prompt.prompt_id)
            if is_whole(plan, played):
                continue
            records = [self.journal.read(rollout.place) for rollout in played]
            for record in records:
                if FAILURE in _info(record):  # it goes on, and keeps what it has cost before
                    self.meter.carry((record["prompt_id"], record["sample"]), record[_SPENT])
            yield Job(prompt, plan, [rollout_from_row(record) for record in records])

    def finished(self, rollout: Rollout) -> None:
        """Keep a rollout. Raises EngineError when too many have failed."""
        record = rollout_row(rollout) | {_SPENT: self.meter.take(rollout.key)}
        self._note(self.journal.append(record), record)
        plan, turns = self.plan_of(rollout.prompt_id), len(turns_of(rollout))
        full, fork = self.turns_of_plan(plan), plan.branch_turn or 0
        siblings = plan.samples - 1 if turns <= fork and not was_cut(rollout) else 0
        self.progress.done += 1
        self.progress.rollouts -= siblings
        self.progress.skip(full - turns + siblings * (full - fork))
        if rollout.status == "failed":
            self.progress.failed += 1
            self.refuse_failures(rollout.info.get(FAILURE, rollout.end_reason))

    def refuse_failures(self, last: str = "") -> None:
        """Raise EngineError where more rollouts have failed than may."""
        # What a server failed in an earlier run doesn't count: it is played on.
        failed, planned = self.progress.failed, self.progress.rollouts
        if failed <= self.max_failed_share * planned:
            return
        raise EngineError(
            f"{failed} of {planned} rollouts failed, and --max_failed_share is "
            f"{self.max_failed_share:g}{f'; the last one: {last}' if last else ''}. What is "
            "finished is kept: the same command goes on, and plays those again that a server "
            "failed; a larger --max_failed_share accepts failed rollouts"
        )

    def batches(self) -> Iterator[Any]:
        """Yield the rollouts as Arrow record batches in key order."""
        import pyarrow as pa

        from pipeline.records import ROLLOUTS

        rows: list[dict[str, Any]] = []
        for place in self.shelf.places():
            rows.append(self.journal.read(place))
            if len(rows) == _BATCH_ROWS:
                yield pa.RecordBatch.from_pylist(rows, schema=ROLLOUTS)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=ROLLOUTS)


def _ended(plan: Plan, played: Sequence[Played]) -> bool:
    """Say whether a prompt's dialogue ended before its fork: then one rollout is all there is."""
    return any(not rollout.cut and rollout.turns <= (plan.branch_turn or 0) for rollout in played)


def is_whole(plan: Plan, played: Sequence[Played]) -> bool:
    """Say whether nothing of a prompt is left to play."""
    return _ended(plan, played) or sum(not rollout.cut for rollout in played) == plan.samples


def _info(record: Mapping[str, Any]) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(record["info"])
    return info
