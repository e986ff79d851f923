"""Whole dialogues over every template: what the engine got, what is recorded, what trains.

The engine samples ids that no encoding of their text would give; users type special tokens. The
templates themselves, rendered without chat.py, are the reference.
"""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
import pytest

from pipeline.admission import play_all
from pipeline.chat import Chat
from pipeline.engines.base import Completion, Request, RequestFailed
from pipeline.environments.base import Dialogue, End
from pipeline.examples import sequence_of
from pipeline.packing import Strand, strand_rows
from pipeline.plans import Plan
from pipeline.records import Message, Prompt, Rollout, ToolCall
from pipeline.rollout import Job, TemplateContext
from pipeline.rows import rollout_from_row, rollout_row
from templates import FORMATS, PUBLISHED, make_tokenizer
from tests.playing import DATE, table

TURNS = 4
TEMPLATES = [*FORMATS, *(f"published {name}" for name in PUBLISHED)]
OPENS_A_THOUGHT = (
    *("qwen3_thinking", "r1"),
    *("published deepseek_r1_distill", "published qwen3_5_think"),
)
THINKS = ("qwen3", "thoughtful", "published glm4moe", "published qwen3", *OPENS_A_THOUGHT)
SHOWS_THOUGHTS = (
    *("thoughtful", "published glm4moe"),
    *("published qwen3", "published qwen3_5_think"),
)
"""Templates that show thoughts again: all of them, emptied, or those since the user spoke last."""
MOVES_TOOLS = ("mistral_tools",)
CALLS_TOOLS = (
    *("chatml", "qwen25", *MOVES_TOOLS),
    *("published qwen2_5", "published qwen3", "published qwen3_5_think"),
)
MARKER = 0xF000
"""Private-use characters from here on stand for what the assistant said, one for each turn."""


class Arbitrary:
    """Samples any ids but special ones; stops or is cut; a model that thinks does so now and then.

    Keeps what it got and what it said by (prompt, sample, turn).
    """

    speaks = "ids"
    max_context = 10**6

    def __init__(self, name: str, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.thinks = name in THINKS
        # Templates trim the lines around a thought: there the page would not be what was sampled.
        kept = (lambda text: "\n" not in text) if self.thinks else bool
        texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in added}
        self.plain = [i for i, text in texts.items() if kept(text)]
        self.begins = [] if name in OPENS_A_THOUGHT else tokenizer("<think>\n").input_ids
        self.ends = tokenizer("\n</think>\n\n").input_ids
        self.got: dict[tuple[str, int, int], list[int]] = {}
        self.said: dict[tuple[str, int, int], list[int]] = {}

    async def complete(self, request: Request) -> Completion:
        assert request.key not in self.got, "no turn is sampled twice"
        draw = np.random.Generator(np.random.Philox(request.seed))
        ids = self._some(draw)
        if self.thinks and draw.random() < 0.6:
            cut = draw.random() < 0.3
            ids = [*self.begins, *self._some(draw), *([] if cut else [*self.ends, *ids])]
        stopped = bool(draw.random() < 0.6)
        self.got[request.key] = list(request.ids)
        self.said[request.key] = [*ids, *request.stop_ids[:stopped]]
        await asyncio.sleep(draw.random() / 1000)  # so that dialogues overtake one another
        ids = list(self.said[request.key])
        return Completion(ids, [-1.0] * len(ids), "stop" if stopped else "length")

    def _some(self, draw: np.random.Generator) -> list[int]:
        return draw.choice(self.plain, size=draw.integers(1, 16)).tolist()

    async def close(self) -> None:
        """Hold nothing."""


class Fails(Arbitrary):
    """Loses one request in six, for good."""

    async def complete(self, request: Request) -> Completion:
        if request.seed % 6 == 0:
            raise RequestFailed("server_lost", "gone")
        return await super().complete(request)


class Hostile:
    """Types the template's special tokens and what could pass for one of our own markers."""

    def __init__(self, special: Sequence[str], tools: bool) -> None:
        self.tools = tools
        self.texts = [
            "".join(special) + " and " + special[-1] * 2,
            f"\ue000{special[0][0]} {special[0]}\ue001 {{dialogue}} Question: é 🙂 \n",
            "Is it the end of the user's turn?",
        ]

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        prompt_id, sample, turn = dialogue.key
        text = f"{self.texts[turn % 3]} {prompt_id} {sample}"
        if self.tools and turn == 2:
            return [Message(role="tool", content=text, tool_call_id=str(i)) for i in range(2)]
        return [Message(role="user", content=text)]


def opening(name: str, special: Sequence[str]) -> list[Message]:
    """Return a dialogue's beginning: a system prompt, an example, tools, where there can be."""
    system = [Message(role="system", content=f"Be brief. {special[0]}")] * (name != "gemma")
    calls = [ToolCall(id="1", name="guess", arguments='{"number": 16}')]
    called = [Message(role="assistant", content="Let me see.", tool_calls=calls)]
    answer = Message(role="tool", content=f"higher {special[-1]}", tool_call_id="1")
    example = [Message(role="user", content="Guess."), *called, answer] * (name in CALLS_TOOLS)
    return [*system, *example, Message(role="user", content=f"Hi {''.join(special)} there.")]


PLANS = {f"h{h}": Plan(3, h, TURNS - 1) for h in range(TURNS)} | {"no": Plan(2, None, TURNS - 1)}
"""Prompts that fork at each turn, and one that doesn't."""


def play(
    name: str, chat: Chat, engine: Arbitrary, earlier: Sequence[Rollout] = ()
) -> list[Rollout]:
    """Play what is missing of all prompts; return the rows as recorded, in key order."""
    added = chat.tokenizer.added_tokens_decoder.values()
    special = sorted(token.content for token in added if token.special)
    tools = json.dumps([{"type": "function", "function": {"name": special[0]}}])
    jobs = []
    for prompt_id, plan in PLANS.items():
        with_tools = tools if name in CALLS_TOOLS else None
        prompt = Prompt(prompt_id, opening(name, special), {}, with_tools)
        done = [rollout for rollout in earlier if rollout.prompt_id == prompt_id]
        jobs.append(Job(prompt, plan, done))
    rollouts: list[Rollout] = []
    context, user = TemplateContext(chat), Hostile(special, name in CALLS_TOOLS)
    changes = {"chat": chat, "context": context, "environment": user}
    seat = table(engine, chat.tokenizer, rollouts, **changes)
    asyncio.run(play_all(jobs, seat, 4))
    rows = [rollout_from_row(json.loads(json.dumps(rollout_row(r)))) for r in rollouts]
    return sorted(rows, key=lambda row: row.key)


@cache
def played(name: str) -> tuple[Chat, Arbitrary, list[Rollout]]:
    """Play all prompts to their ends with a template; return also who said what."""
    published = name.startswith("published ")
    tokenizer = make_tokenizer(name.removeprefix("published "), published)
    chat, engine = Chat(tokenizer, DATE), Arbitrary(name, tokenizer)
    rows = play(name, chat, engine)
    assert [r.key for r in rows] == [(i, s) for i in PLANS for s in range(PLANS[i].samples)]
    assert all(r.status == "complete" for r in rows)
    return chat, engine, rows


def contexts(rollout: Rollout) -> list[list[int]]:
    """Return what the record says that the policy saw at each turn."""
    context, seen = list[int](), []
    for turn in rollout.turns or []:
        seen.append(context[: turn.keep] + turn.prompt_ids)
        context = seen[-1] + turn.response_ids
    return seen


def key(rollout: Rollout, turn: int) -> tuple[str, int, int]:
    """Return the request that a turn was sampled by: before the fork the trunk's."""
    shared = rollout.branch_turn is not None and turn < rollout.branch_turn
    return rollout.prompt_id, 0 if shared else rollout.sample, turn


def text_of(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(list(ids), skip_special_tokens=False)


def page(chat: Chat, messages: Sequence[Message], tools: str | None) -> str:
    """Render without chat.py, as a reference."""
    said: list[dict[str, Any]] = [{k: v for k, v in m.items() if v is not None} for m in messages]
    for message in said:
        if "tool_calls" in message:
            message["tool_calls"] = [
                {"function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
                for call in message["tool_calls"]
            ]
    return chat.tokenizer.apply_chat_template(
        said,
        tools=json.loads(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=True,
        strftime_now=datetime.fromisoformat(DATE).strftime,
    )


def before_turn(rollout: Rollout, turn: int) -> int:
    """Count the messages before a policy turn; the policy's are the last assistant messages."""
    spoken = [i for i, m in enumerate(rollout.messages) if m["role"] == "assistant"]
    return spoken[len(spoken) - TURNS + turn]


def appended(name: str, chat: Chat, rollout: Rollout, turn: int) -> str:
    """Return the template's page with each policy turn read back from the ids it sampled."""
    messages = list(rollout.messages[: before_turn(rollout, turn)])
    for t in range(turn):
        marked = Message(role="assistant", content=chr(MARKER + t))
        messages[before_turn(rollout, t)] = marked
    expected = page(chat, messages, rollout.tools)
    for t in range(turn):
        ids = rollout.turns[t].response_ids
        # "plain" writes no end of turn; one that was sampled stays.
        said = ids[:-1] if ids[-1] == chat.stop_ids[0] and name != "plain" else ids
        # Mistral's puts a blank before what the assistant says; a model samples its own.
        marked = f"[/INST] {chr(MARKER + t)}" if name == "mistral" else chr(MARKER + t)
        expected = expected.replace(marked, "[/INST]" * (name == "mistral") + text_of(chat, said))
    return expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_record_is_what_the_engine_got_and_sampled(name: str) -> None:
    _, engine, rollouts = played(name)
    reached = set()
    for rollout in rollouts:
        for t, context in enumerate(contexts(rollout)):
            assert context == engine.got[key(rollout, t)]
            assert rollout.turns[t].response_ids == engine.said[key(rollout, t)]
            reached.add(key(rollout, t))
    assert reached == set(engine.got), "every completion is on record"


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_stopped_and_cut_and_a_cut_one_is_not_ended_by_us(name: str) -> None:
    chat, _, rollouts = played(name)
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    assert {turn.finish_reason for turn in turns} == {"stop", "length"}
    for turn in turns:
        assert (turn.response_ids[-1] in chat.stop_ids) == (turn.finish_reason == "stop")
        assert not set(turn.response_ids[:-1]) & set(chat.stop_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_kept_is_all_or_the_longest_true_prefix(name: str) -> None:
    chat, _, rollouts = played(name)
    appends, shorter = chat.append_only and name not in MOVES_TOOLS, 0
    for rollout in rollouts:
        seen = contexts(rollout)
        for t in range(1, TURNS):
            before = seen[t - 1] + rollout.turns[t - 1].response_ids
            keep = rollout.turns[t].keep
            assert keep == len(before) or before[keep] != seen[t][keep]
            shorter += keep < len(before)
            if appends and keep < len(before):
                # The one thing that such a template writes otherwise: a thought without its end.
                message = rollout.messages[before_turn(rollout, t - 1)]
                assert message["reasoning_content"] and not message["content"]
                assert before[-1] in chat.stop_ids
    assert (shorter == 0) == (appends and name != "thoughtful")


@pytest.mark.parametrize("name", TEMPLATES)
def test_siblings_share_all_before_their_fork(name: str) -> None:
    _, _, rollouts = played(name)
    parted = set()
    for h in range(TURNS):
        siblings = [r for r in rollouts if r.prompt_id == f"h{h}"]
        first = siblings[0]
        for other in siblings[1:]:
            assert other.branch_turn == h
            assert other.turns[:h] == first.turns[:h]
            assert contexts(other)[h] == contexts(first)[h]
            start = before_turn(first, h)
            assert other.messages[:start] == first.messages[:start]
            assert other.turns[h].response_ids != first.turns[h].response_ids
            parted.add(h)
    assert parted == set(range(TURNS))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_context_reads_as_the_templates_own_page(name: str) -> None:
    chat, _, rollouts = played(name)
    for rollout in rollouts:
        for t, context in enumerate(contexts(rollout)):
            messages = rollout.messages[: before_turn(rollout, t)]
            expected = (
                appended(name, chat, rollout, t)
                if chat.append_only and name not in (*THINKS, *MOVES_TOOLS)
                else page(chat, messages, rollout.tools)
            )
            assert text_of(chat, context) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_ids_are_the_templates_alone_and_one_is_the_bos(name: str) -> None:
    chat, _, rollouts = played(name)
    tokenizer = chat.tokenizer
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for rollout in rollouts:
        for t, context in enumerate(contexts(rollout)):
            # With harmless messages, all special tokens of the page are the template's.
            empty = [
                Message(role=m["role"], content=f"x{i}", tool_calls=m.get("tool_calls"))
                for i, m in enumerate(rollout.messages[: before_turn(rollout, t)])
            ]
            tools = rollout.tools.replace(min(special.values()), "x") if rollout.tools else None
            written = page(chat, empty, tools)
            sampled = sum(turn.finish_reason == "stop" for turn in rollout.turns[:t])
            for id_, text in special.items():
                extra = sampled if name == "plain" and id_ in chat.stop_ids else 0
                assert context.count(id_) == written.count(text) + extra, text
            assert context.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
            assert tokenizer.bos_token_id in (None, context[0])


@pytest.mark.parametrize("name", THINKS)
def test_models_that_think_do_so_here(name: str) -> None:
    chat, engine, rollouts = played(name)
    end = chat.tokenizer.convert_tokens_to_ids("</think>")
    opened = name in OPENS_A_THOUGHT
    begin = chat.tokenizer.convert_tokens_to_ids("<think>")
    cut = [ids for ids in engine.said.values() if end not in ids and (opened or begin in ids)]
    whole = [ids for ids in engine.said.values() if end in ids]
    assert len(cut) > 3 and len(whole) > 3
    if name not in SHOWS_THOUGHTS:
        for rollout in rollouts:
            for context in contexts(rollout):
                assert end not in context


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_trains_is_what_was_sampled_where_it_was_sampled(name: str) -> None:
    _, engine, rollouts = played(name)
    for rollout in rollouts:
        sequence = sequence_of(rollout, range(TURNS), None)
        strand = Strand(sequence.ids, sequence.mask, sequence.segments)
        trained = [
            (row.ids[: source + 1].tolist(), int(target))
            for row in strand_rows(strand, 0, rollout.prompt_id)
            for source, target in zip(row.sources, row.targets, strict=True)
        ]
        sampled = [
            (engine.got[key(rollout, t)] + said[:i], said[i])
            for t in range(TURNS)
            for said in [engine.said[key(rollout, t)]]
            for i in range(len(said))
        ]
        assert trained == sampled


@pytest.mark.parametrize("name", TEMPLATES)
def test_after_lost_requests_another_run_samples_the_rest_and_nothing_twice(name: str) -> None:
    chat, whole, rollouts = played(name)
    first, second = Fails(name, chat.tokenizer), Arbitrary(name, chat.tokenizer)
    torn = play(name, chat, first)
    failed = [rollout for rollout in torn if rollout.status == "failed"]
    assert {rollout.end_reason for rollout in failed} == {"server_lost"}
    assert len({len(rollout.turns) for rollout in failed}) > 1, "some had begun"
    rest = play(name, chat, second, torn)
    finished = [rollout for rollout in torn if rollout.status == "complete"]
    assert sorted([*finished, *rest], key=lambda row: row.key) == rollouts
    assert not set(first.got) & set(second.got)
    assert first.got | second.got == whole.got


@pytest.mark.parametrize("name", ["llama31", "published llama3_2"])
def test_llama_sees_the_pinned_date_at_every_turn_whatever_today_is(name: str) -> None:
    chat, _, rollouts = played(name)
    dates = [
        text_of(chat, context).count("\nToday Date: 31 Jan 2026\n")
        for rollout in rollouts
        for context in contexts(rollout)
    ]
    assert dates == [1] * len(dates)
