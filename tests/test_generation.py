"""A run of generate: what is left, what goes on, what stops it, and what it adds up to."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.admission import play_all
from pipeline.engines.base import Completion, Request, RequestFailed, Usage
from pipeline.environments.guessing_game import GuessingGame
from pipeline.errors import EngineError
from pipeline.generation import Generation, is_whole
from pipeline.journal import Journal, read_journal
from pipeline.meter import Metered
from pipeline.plans import Plan, plan_for
from pipeline.prompts import guessing_games
from pipeline.records import FAILURE, Prompt, Rollout
from pipeline.rollout import Table, TextContext, was_cut
from pipeline.rows import rollout_from_row
from pipeline.shelf import Played, Shelf
from tests.playing import Said, Silent, table, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TURNS = 4


class Moody(Said):
    """Says its number of asked turns, but fails the requests for which `fails` says so."""

    def __init__(self, fails: Callable[[Request], bool] = lambda request: False) -> None:
        super().__init__(TOKENIZER, "")
        self.fails = fails

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.fails(request):
            raise RequestFailed("server_lost", "the server at http://x is lost: ConnectError")
        ids = TOKENIZER(f"{request.seed % 97}", add_special_tokens=False).input_ids
        return Completion(ids, None, "stop", usage=Usage(len(request.ids), len(ids), 3))


class Texts(Moody):
    """The same from a server that speaks text."""

    speaks = "text"

    async def complete(self, request: Request) -> Completion:
        said = await super().complete(request)
        assert request.ids == []
        usage = Usage(10 * len(request.messages), 2)
        text = f"{request.seed % 97}"
        return replace(said, ids=[], text=text, reasoning="hm", usage=usage)


def prompts(count: int) -> list[Prompt]:
    return list(guessing_games("guessing_game", count, 0))


def generation(folder: Path, count: int, share: float = 1.0, plan: str = "refuel") -> Generation:
    shelf = Shelf()
    for prompt in prompts(count):
        assert shelf.add(prompt, prompt.prompt_id) is None
    return Generation(
        shelf,
        Journal(folder / "journal.jsonl"),
        lambda prompt_id: plan_for(plan, 0, prompt_id, TURNS, 3),
        lambda plan: plan.score_turn + 1,
        share,
        0,
    )


def seated(engine: Any, finished: Callable[[Rollout], None], **changes: Any) -> Table:
    return replace(table(engine, TOKENIZER, [], **changes), finished=finished)


def run(generation: Generation, engine: Any, concurrency: int = 4, **changes: Any) -> None:
    metered = Metered(engine, "policy", generation.meter)
    seat = seated(metered, generation.finished, **changes)
    asyncio.run(play_all(generation.jobs(), seat, concurrency))
    generation.journal.sync()


def records(folder: Path) -> dict[tuple[str, int], dict]:
    """Return the last record of each key."""
    found = read_journal(folder / "journal.jsonl")
    return {(row["prompt_id"], row["sample"]): row for row in found}


def rows(generation: Generation) -> list[dict]:
    return [row for batch in generation.batches() for row in batch.to_pylist()]


@pytest.mark.parametrize("plan", ["refuel", "refuel_uniform", "independent", "fork_geometric"])
@pytest.mark.parametrize("speaks", ["ids", "text"])
def test_what_a_server_failed_goes_on_at_its_turn_and_ends_as_if_nothing_had_been(
    tmp_path, plan, speaks
):
    """A third of all requests fail in the first run, a third of the others in the second."""
    engine = {"ids": Moody, "text": Texts}[speaks]
    more = {"context": TextContext(), "chat": None} if speaks == "text" else {}
    (tmp_path / "whole").mkdir()
    whole = generation(tmp_path / "whole", 12, plan=plan)
    run(whole, engine(), **more)
    expected = rows(whole)
    asked = Counter[tuple]()
    for attempt in range(3):
        sick = engine(lambda request, k=attempt: request.seed % 3 == k and k < 2)
        torn = generation(tmp_path, 12, plan=plan)
        done = {key for key, row in records(tmp_path).items() if row["status"] != "failed"}
        run(torn, sick, **more)
        asked.update(r.key for r in sick.requests if not sick.fails(r))
        assert not done & {request.key[:2] for request in sick.requests} - trunks(torn)
    assert rows(torn) == expected
    # No turn that was sampled is sampled again.
    assert set(asked.values()) == {1}
    assert torn.summary.counts == whole.summary.counts
    assert torn.summary.spent == whole.summary.spent
    assert torn.summary.spent["policy"]["requests"] == len(asked)
    again = generation(tmp_path, 12, plan=plan)
    assert (again.prompts_left, again.progress.turns) == (0, 0)
    assert again.summary.counts == whole.summary.counts


def trunks(generation: Generation) -> set[tuple[str, int]]:
    """Sample 0 of each prompt also plays the trunk of its siblings."""
    return {(prompt_id, 0) for prompt_id in generation.shelf.ids()}


def test_a_failed_rollout_is_recorded_with_its_turns_and_the_reason(tmp_path):
    run(generation(tmp_path, 1, plan="independent"), Moody(lambda r: r.key[1:] == (1, 2)))
    row = records(tmp_path)[prompts(1)[0].prompt_id, 1]
    assert (row["status"], row["end_reason"], len(row["turns"])) == ("failed", "server_lost", 2)
    assert "ConnectError" in json.loads(row["info"])[FAILURE]
    assert was_cut(rollout_from_row(row))
    assert row["messages"][-1]["role"] == "user"  # the game had answered turn 1


def test_too_many_failures_stop_the_run_and_keep_what_is_finished(tmp_path):
    torn = generation(tmp_path, 30, share=0.1)
    with pytest.raises(EngineError, match=r"7 of 60 rollouts failed.*0\.1.*ConnectError.*plays"):
        run(torn, Moody(lambda request: request.key[1] == 1))
    statuses = Counter(row["status"] for row in records(tmp_path).values())
    # Those that failed in the same instant are recorded as well.
    assert 7 <= statuses["failed"] <= 10 and statuses["complete"] > 0


def test_what_failed_in_an_earlier_run_does_not_count_against_the_next(tmp_path):
    """Seven failed before; in the next run six may, and the seventh stops it again."""
    with pytest.raises(EngineError, match="7 of 60 rollouts failed"):
        run(generation(tmp_path, 30, share=0.1), Moody(lambda r: r.key[1] == 1), concurrency=1)
    failed = [key for key, row in records(tmp_path).items() if row["status"] == "failed"]
    assert len(failed) == 7
    again = generation(tmp_path, 30, share=0.1)
    assert again.progress.failed == 0
    run(again, Moody(lambda request: request.key[:2] in failed[:6]))
    again.refuse_failures()
    assert again.progress.failed == again.summary.counts["status_failed"] == 6
    with pytest.raises(EngineError, match="6 of 60 rollouts failed"):
        again.max_failed_share = 0.09
        again.refuse_failures()


def test_failures_within_the_share_are_rows_of_the_repo(tmp_path):
    torn = generation(tmp_path, 30, share=0.5)
    run(torn, Moody(lambda request: request.key[1] == 1))
    torn.refuse_failures()
    assert Counter(row["status"] for row in rows(torn))["failed"] == 30
    assert (torn.progress.done, torn.progress.rollouts, torn.progress.failed) == (60, 60, 30)


def test_any_other_error_stops_at_once(tmp_path):
    class Broken(Moody):
        async def complete(self, request):
            raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        run(generation(tmp_path, 3), Broken())
    assert records(tmp_path) == {}


def test_turns_left_count_down_to_nothing_whatever_ends_early(tmp_path):
    """Silent ends dialogues after two turns: some before their fork, then there is one rollout."""
    run_ = generation(tmp_path, 40)
    turns = run_.progress.turns
    assert turns == sum(
        (plan.branch_turn or 0) + 2 * (plan.score_turn + 1 - (plan.branch_turn or 0))
        for plan in map(run_.plan_of, run_.shelf.ids())
    )
    run(run_, Moody(), environment=Silent(2))
    progress = run_.progress
    assert progress.turns == progress.meter.total["policy"]["requests"] < turns
    assert progress.done == progress.rollouts == len(rows(run_)) < 80
    assert "0:00 left" in progress.line()


def test_dialogues_in_play_are_bounded_and_forks_come_first(tmp_path):
    peak, order = 0, []

    class Watched(Moody):
        async def complete(self, request):
            nonlocal peak
            peak = max(peak, seat.rounds.live)
            order.append(request.key)
            return await super().complete(request)

    run_ = generation(tmp_path, 12, plan="independent")
    seat = seated(Watched(), run_.finished)
    jobs = list(run_.jobs())
    asyncio.run(play_all(jobs, seat, 5))
    assert peak == 5
    begun = [key[0] for key in order if key[2] == 0]
    # The three rollouts of a prompt begin one after the other, before those of the next.
    assert begun == [job.prompt.prompt_id for job in jobs for _ in range(3)]


def test_long_dialogues_tend_to_be_early_and_all_lengths_are_mixed(tmp_path):
    run_ = generation(tmp_path, 400)
    jobs = list(run_.jobs())
    assert sorted(job.prompt.prompt_id for job in jobs) == [p.prompt_id for p in prompts(400)]
    places: dict[int, list[int]] = {turn: [] for turn in range(TURNS)}
    for place, job in enumerate(jobs):
        places[job.plan.score_turn].append(place)
    means = [sum(found) / len(found) for found in places.values()]
    assert means == sorted(means, reverse=True)
    # The shortest dialogues begin before the first half of the longest ones has.
    assert min(places[0]) < sorted(places[TURNS - 1])[len(places[TURNS - 1]) // 2]
    assert [job.prompt for job in generation(tmp_path / "again", 400).jobs()] == [
        job.prompt for job in jobs
    ]


def test_a_straggler_delays_itself_only(tmp_path):
    """One dialogue's first turn takes until all others are finished."""
    run_ = generation(tmp_path, 10, plan="independent")
    slow = (prompts(10)[0].prompt_id, 1, 0)
    others_done = asyncio.Event()

    class Straggling(Moody):
        async def complete(self, request):
            if request.key == slow:
                await asyncio.wait_for(others_done.wait(), 30)
            return await super().complete(request)

    def finished(rollout):
        run_.finished(rollout)
        if run_.progress.done == 29:
            others_done.set()

    seat = seated(Straggling(), finished)
    asyncio.run(play_all(run_.jobs(), seat, 4))
    assert run_.progress.done == 30


def test_policy_and_user_work_at_the_same_time(tmp_path):
    """While one dialogue's policy speaks, the other's environment answers, and the other way."""
    run_ = generation(tmp_path, 2, plan="independent")
    busy, together = Counter[str](), []

    async def work(who: str) -> None:
        busy[who] += 1
        await asyncio.sleep(0.01)
        together.append(busy["policy"] > 0 and busy["user"] > 0)
        busy[who] -= 1

    class Policy(Moody):
        async def complete(self, request):
            await asyncio.sleep(0.01 * (request.key[1] % 2))  # out of step
            await work("policy")
            return await super().complete(request)

    class User(GuessingGame):
        async def reply(self, dialogue):
            await work("user")
            return await super().reply(dialogue)

    seat = seated(Policy(), run_.finished, environment=User())
    asyncio.run(play_all(run_.jobs(), seat, 6))
    assert any(together)


def test_whole_is_all_samples_or_an_end_before_the_fork():
    plan = Plan(2, 1, 3)
    assert not is_whole(plan, [])
    assert not is_whole(plan, [Played(0, 0, 4, False)])
    assert is_whole(plan, [Played(0, 0, 4, False), Played(1, 9, 2, False)])
    assert is_whole(plan, [Played(0, 0, 1, False)])
    assert not is_whole(plan, [Played(0, 0, 1, True)])
    assert not is_whole(plan, [Played(0, 0, 4, False), Played(1, 9, 2, True)])
