"""Play one dialogue: policy turn, reply, policy turn, ... up to its score turn.

A prompt's rollouts share a trunk up to its branch turn; the trunk is played once, then forked. Who
plays when is decided in admission.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pipeline.dialogues import with_system_prompt
from pipeline.engines.base import Completion, Engine, Request, RequestFailed, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.environments.base import Dialogue, End, Environment
from pipeline.errors import RowError
from pipeline.plans import Plan
from pipeline.records import (
    FAILURE,
    FINISH_REASONS,
    USER_RETRIES,
    Message,
    Prompt,
    Rollout,
    Turn,
)
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


class TextContext:
    """For a policy that reads messages: there are no ids, and the server knows its bounds."""

    def next(self, dialogue: Dialogue) -> tuple[int, list[int]]:
        """See Context."""
        return 0, []


@dataclass(frozen=True, slots=True)
class Table:
    """Everything a dialogue is played with. `chat` is None where the policy speaks text."""

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
    system_prompt: str = ""
    """The policy's system message, in place of a prompt's own; "" leaves that."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids if self.chat else ()

    def turns_of(self, plan: Plan) -> int:
        """Return how many policy turns a rollout of a plan has when nothing ends it before."""
        return max(plan.score_turn + 1, self.least_turns)


class Job(NamedTuple):
    """A prompt to play. `done`: what earlier runs left of it, finished or failed by a server."""

    prompt: Prompt
    plan: Plan
    done: Sequence[Rollout] = ()


class Branch(NamedTuple):
    """A dialogue that has come to its fork."""

    dialogue: Dialogue
    plan: Plan


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
        stop_ids=table.stop_ids,
        key=dialogue.key,
        messages=tuple(dialogue.messages),
    )
    said = await table.engine.complete(request)
    dialogue.turns.append(Turn(keep, prompt_ids, said.ids, said.logprobs, said.finish_reason))
    dialogue.context = [*request.ids, *said.ids]
    dialogue.messages.append(_message(said, prompt_ids, table))
    return None


def _message(said: Completion, prompt_ids: list[int], table: Table) -> Message:
    if said.text is None:
        return table.chat.message(said.ids, prompt_ids)
    message = Message(role="assistant", content=said.text)
    return message | Message(reasoning_content=said.reasoning) if said.reasoning else message


def rollout_of(dialogue: Dialogue, plan: Plan, end: End | None, table: Table) -> Rollout:
    """Close a dialogue. One that ended before its score turn has its last turn as score turn.

    A dialogue without a single policy turn has nothing to score and is recorded as failed.
    """
    played = "complete" if end is None else "ended_early"
    turns, info = dialogue.turns, dialogue.info
    rollout = Rollout(
        prompt_id=dialogue.prompt_id,
        sample=dialogue.sample,
        messages=dialogue.messages,
        turns=turns,
        branch_turn=plan.branch_turn,
        score_turn=max(min(plan.score_turn, len(turns) - 1), 0),
        status=played if turns and FAILURE not in info else "failed",
        end_reason="score_turn" if end is None else end.reason,
        tools=dialogue.tools,
        info=info,
    )
    if table.engine.speaks == "text":
        # Without ids there are no turns to record; how each ended is still worth keeping.
        rollout.turns = None
        rollout.info = info | {FINISH_REASONS: [turn.finish_reason for turn in turns]}
    return rollout


def turns_of(rollout: Rollout) -> list[Turn]:
    """Return a rollout's turns; of one that was played as text, turns without ids."""
    if rollout.turns is not None:
        return rollout.turns
    return [Turn(0, [], [], None, reason) for reason in rollout.info.get(FINISH_REASONS, [])]


def was_cut(rollout: Rollout) -> bool:
    """Say whether a server failed it, so that it is to be played on."""
    return rollout.status == "failed" and FAILURE in rollout.info


def dialogue_of(done: Rollout, run_seed: int, turns: int, sample: int) -> Dialogue:
    """Rebuild a dialogue from a record, as it was before policy turn `turns`.

    The environment's reply before that turn is kept; nobody must ask for it again.
    """
    said = turns_of(done)
    context: list[int] = []
    for turn in said[:turns]:
        context = context[: turn.keep] + turn.prompt_ids + turn.response_ids
    spoken = [i for i, message in enumerate(done.messages) if message["role"] == "assistant"]
    # The opening may hold assistant messages of the dataset; the policy's own are the last ones.
    policy = spoken[len(spoken) - len(said) :]
    cut = policy[turns] if turns < len(said) else len(done.messages)
    info = {k: v for k, v in done.info.items() if k not in (FAILURE, FINISH_REASONS)}
    if USER_RETRIES in info:
        kept = {t: n for t, n in info.pop(USER_RETRIES).items() if int(t) <= turns}
        info |= {USER_RETRIES: kept} if kept else {}
    messages, tools = done.messages[:cut], done.tools
    return Dialogue(run_seed, done.prompt_id, sample, messages, tools, said[:turns], context, info)


async def play_trunk(job: Job, table: Table) -> list[Branch]:
    """Play to just before the branch turn, or rebuild that point; return what parts there.

    A trunk that ends before its fork is recorded as one rollout, and its siblings don't exist.
    """
    whole = [rollout for rollout in job.done if not was_cut(rollout)]
    torn = {rollout.sample: rollout for rollout in job.done if was_cut(rollout)}
    fork = job.plan.branch_turn or 0
    if whole and len(turns_of(whole[0])) <= fork:
        return []
    trunk = _trunk(job.prompt, [*whole, *torn.values()], fork, table)
    try:
        end = await play(trunk, table, fork)
        if end is None and trunk.turns:
            end = await _reply(trunk, table)
    except RequestFailed as error:
        _record_failure(trunk, job.plan, error, table)
        return []
    if end is None and isinstance(opened := _next_ids(trunk, table), End):
        end = opened
    if end is not None:
        table.finished(rollout_of(trunk, job.plan, end, table))
        return []
    left = sorted(set(range(job.plan.samples)) - {rollout.sample for rollout in whole})
    return [Branch(_branch(trunk, torn.get(sample), fork, sample), job.plan) for sample in left]


def _trunk(prompt: Prompt, records: Sequence[Rollout], fork: int, table: Table) -> Dialogue:
    if records:
        known = max(records, key=lambda rollout: min(len(turns_of(rollout)), fork))
        return dialogue_of(known, table.run_seed, min(fork, len(turns_of(known))), 0)
    messages = with_system_prompt(prompt.messages, table.system_prompt)
    info = dict(prompt.info)
    return Dialogue(table.run_seed, prompt.prompt_id, 0, messages, prompt.tools, info=info)


def _branch(trunk: Dialogue, torn: Rollout | None, fork: int, sample: int) -> Dialogue:
    """Fork the trunk; a rollout that a server failed after the fork goes on where it was."""
    if torn is None or len(turns_of(torn)) <= fork:
        return trunk.fork(sample)
    return dialogue_of(torn, trunk.run_seed, len(turns_of(torn)), sample)


async def play_branch(branch: Branch, table: Table) -> list[Branch]:
    """Play a rollout from its fork to its end and record it; nothing parts from it any more."""
    dialogue, plan = branch
    try:
        end = await play(dialogue, table, table.turns_of(plan))
        if table.play_last_reply and end is None:
            end = await _reply(dialogue, table)
    except RequestFailed as error:
        _record_failure(dialogue, plan, error, table)
        return []
    table.finished(rollout_of(dialogue, plan, end, table))
    return []


def _record_failure(dialogue: Dialogue, plan: Plan, error: RequestFailed, table: Table) -> None:
    dialogue.info = dialogue.info | {FAILURE: str(error)}
    table.finished(rollout_of(dialogue, plan, End(error.reason), table))
