"""Play dialogues concurrently: one coroutine a dialogue, no turn barrier.

A prompt's rollouts share a trunk up to its branch turn; the trunk is played once, then forked.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.engines.base import Engine, Request, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.environments.base import Dialogue, End, Environment
from pipeline.errors import RowError
from pipeline.plans import Plan
from pipeline.prompts import Prompt
from pipeline.records import Message, Rollout, Turn
from pipeline.seeds import seed_for


class Context(Protocol):
    """What the policy sees next. Condensers are other implementations."""

    def next(self, dialogue: Dialogue) -> tuple[int, list[int]]:
        """Return (keep, prompt_ids): the next context is `context[:keep] + prompt_ids`."""
        ...


class TemplateContext:
    """The default: the chat template's own bridge after what was sampled."""

    def __init__(self, chat: Any) -> None:
        self.chat = chat

    def next(self, dialogue: Dialogue) -> tuple[int, list[int]]:
        """See Context. Raises RowError where the template refuses the dialogue."""
        if not dialogue.turns:
            return 0, self.chat.prompt(dialogue.messages, dialogue.tools)
        return self.chat.next(dialogue.context, dialogue.messages, dialogue.tools)


@dataclass(frozen=True, slots=True)
class Table:
    """Everything a dialogue is played with."""

    run_seed: int
    engine: Engine
    chat: Any
    sampling: Sampling
    context: Context
    environment: Environment
    rounds: Rounds
    finished: Callable[[Rollout], None]
    """Called with each rollout as soon as it is finished, so that a kill loses none."""
    least_turns: int = 0
    """Play on after the score turn until a dialogue has as many turns."""
    play_last_reply: bool = False


async def play(dialogue: Dialogue, table: Table, turns: int) -> End | None:
    """Play until the dialogue has `turns` policy turns; return why it ended before, if it did."""
    while len(dialogue.turns) < turns:
        if dialogue.turns and (end := await _reply(dialogue, table)):
            return end
        if end := await _policy_turn(dialogue, table):
            return end
    return None


async def _reply(dialogue: Dialogue, table: Table) -> End | None:
    """Let the environment answer the last policy turn, unless it has (a fork after its reply)."""
    if dialogue.messages[-1]["role"] != "assistant":
        return None
    reply = await table.environment.reply(dialogue)
    if isinstance(reply, End):
        return reply
    dialogue.messages += reply
    return None


def _next_ids(dialogue: Dialogue, table: Table) -> tuple[int, list[int]] | End:
    """Return (keep, prompt_ids) of the next policy turn, or why there can't be one."""
    try:
        keep, prompt_ids = table.context.next(dialogue)
    except RowError as error:
        return End(error.reason)
    if keep + len(prompt_ids) >= table.engine.max_context:
        return End("context_full")
    return keep, prompt_ids


async def _policy_turn(dialogue: Dialogue, table: Table) -> End | None:
    opened = _next_ids(dialogue, table)
    if isinstance(opened, End):
        return opened
    keep, prompt_ids = opened
    prompt_id, sample, turn = dialogue.key
    request = Request(
        ids=dialogue.context[:keep] + prompt_ids,
        seed=seed_for(table.run_seed, prompt_id, sample, turn, "policy"),
        sampling=table.sampling,
        stop_ids=table.chat.stop_ids,
        key=dialogue.key,
        messages=tuple(dialogue.messages),
    )
    said = await table.engine.complete(request)
    dialogue.turns.append(Turn(keep, prompt_ids, said.ids, said.logprobs, said.finish_reason))
    dialogue.context = [*request.ids, *said.ids]
    dialogue.messages.append(Message(role="assistant", content=table.chat.decode(said.ids)))
    return None


def rollout_of(dialogue: Dialogue, plan: Plan, end: End | None) -> Rollout:
    """Close a dialogue. One that ended before its score turn has its last turn as score turn.

    A dialogue without a single policy turn has nothing to score and is recorded as failed.
    """
    played = "complete" if end is None else "ended_early"
    return Rollout(
        prompt_id=dialogue.prompt_id,
        sample=dialogue.sample,
        messages=dialogue.messages,
        turns=dialogue.turns,
        branch_turn=plan.branch_turn,
        score_turn=max(min(plan.score_turn, len(dialogue.turns) - 1), 0),
        status=played if dialogue.turns else "failed",
        end_reason="score_turn" if end is None else end.reason,
        tools=dialogue.tools,
        info=dialogue.info,
    )


def trunk_of(done: Rollout, run_seed: int, turns: int) -> Dialogue:
    """Rebuild the trunk from a finished rollout, as it was before policy turn `turns`.

    The environment's reply before that turn is kept; the fork must not ask for it again.
    """
    said = done.turns or []
    context: list[int] = []
    for turn in said[:turns]:
        context = context[: turn.keep] + turn.prompt_ids + turn.response_ids
    spoken = [i for i, message in enumerate(done.messages) if message["role"] == "assistant"]
    # The opening may hold assistant messages of the dataset; the policy's own are the last ones.
    policy = spoken[len(spoken) - len(said) :]
    cut = policy[turns] if turns < len(said) else len(done.messages)
    info = dict(done.info)
    if "user_retries" in info:
        kept = {t: n for t, n in info["user_retries"].items() if int(t) <= turns}
        info = {k: v for k, v in info.items() if k != "user_retries"}
        info |= {"user_retries": kept} if kept else {}
    return Dialogue(
        run_seed, done.prompt_id, 0, done.messages[:cut], done.tools, said[:turns], context, info
    )


async def play_prompt(
    prompt: Prompt, plan: Plan, table: Table, done: Sequence[Rollout] = ()
) -> None:
    """Play what is missing of a prompt's rollouts; `done` holds those an earlier run finished.

    The caller has counted one live dialogue in; every dialogue is counted out here.
    """
    left = sorted(set(range(plan.samples)) - {rollout.sample for rollout in done})
    try:
        trunk, end = await _trunk(prompt, plan.branch_turn or 0, table, done)
        if end is not None:
            # The fork was not reached: one rollout says so, and the others don't exist.
            left = []
            if not done:
                table.finished(rollout_of(trunk, plan, end))
        table.rounds.enter(len(left))
    finally:
        table.rounds.leave()
    await asyncio.gather(*(_branch(trunk.fork(sample), plan, table) for sample in left))


async def _trunk(
    prompt: Prompt, turns: int, table: Table, done: Sequence[Rollout]
) -> tuple[Dialogue, End | None]:
    """Play to just before policy turn `turns`, or rebuild that point from a finished rollout."""
    if done:
        reached = len(done[0].turns or []) > turns
        return trunk_of(done[0], table.run_seed, turns), None if reached else End("ended")
    trunk = Dialogue(
        run_seed=table.run_seed,
        prompt_id=prompt.prompt_id,
        sample=0,
        messages=list(prompt.messages),
        tools=prompt.tools,
        info=dict(prompt.info),
    )
    end = await play(trunk, table, turns)
    if end is None and trunk.turns:
        end = await _reply(trunk, table)
    if end is None and isinstance(opened := _next_ids(trunk, table), End):
        end = opened
    return trunk, end


async def _branch(dialogue: Dialogue, plan: Plan, table: Table) -> None:
    try:
        end = await play(dialogue, table, max(plan.score_turn + 1, table.least_turns))
        if table.play_last_reply and end is None:
            end = await _reply(dialogue, table)
        table.finished(rollout_of(dialogue, plan, end))
    finally:
        table.rounds.leave()


async def play_all(
    jobs: Iterable[tuple[Prompt, Plan, Sequence[Rollout]]], table: Table, concurrency: int
) -> None:
    """Play prompts in order, at most `concurrency` of them at a time.

    The first error stops everything: what is finished is kept, and the stage can be resumed.
    """
    waiting = iter(jobs)
    running: set[asyncio.Task[None]] = set()

    def admit() -> None:
        while len(running) < concurrency and (job := next(waiting, None)):
            table.rounds.enter()
            running.add(asyncio.create_task(play_prompt(job[0], job[1], table, job[2])))

    admit()
    try:
        while running:
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
            admit()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
