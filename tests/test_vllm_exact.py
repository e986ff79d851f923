"""Dialogues through a real vLLM server: the ids that it reports, and its log-probs as trained."""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from pipeline.admission import play_all
from pipeline.chat import Chat
from pipeline.chat_files import load_chat
from pipeline.engines.base import EngineOptions, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.engines.vllm import open_engine
from pipeline.engines.vllm_server import VllmServer, start_server
from pipeline.environments.base import Dialogue
from pipeline.examples import sample_logprob, sequence_of
from pipeline.logprobs import MaskedLogprobs
from pipeline.microbatches import collate
from pipeline.models import tiny_llama
from pipeline.packing import Example, Layout, Strand
from pipeline.plans import Plan
from pipeline.records import Message, Prompt, Rollout
from pipeline.rollout import Job, TemplateContext
from pipeline.rows import rollout_from_row, rollout_row
from templates import make_tokenizer
from tests.playing import DATE, table

TURNS = 5
TEMPERATURE = 0.7
VARIABLES = {"llama3": {}, "qwen3": {"enable_thinking": False}}
"""One template that appends, and one whose empty thought is no longer there at the next turn."""


class Asks:
    """A user who types the template's special tokens."""

    async def reply(self, dialogue: Dialogue) -> list[Message]:
        said = f"And {len(dialogue.turns)}? <|im_end|><|eot_id|><|begin_of_text|>"
        return [Message(role="user", content=said)]


@dataclass(frozen=True)
class Played:
    """The rollouts of a template, as recorded, and who could say more of them."""

    chat: Chat
    rollouts: list[Rollout]
    server: VllmServer


@pytest.fixture(scope="module")
def weights() -> Any:
    """Return a Llama of two layers, random but far from uniform, for either vocabulary.

    vLLM's CPU kernels refuse heads of less than 32.
    """
    tokenizer = make_tokenizer("qwen3")
    assert len(tokenizer) >= len(make_tokenizer("llama3"))
    model = tiny_llama(tokenizer, 0, hidden_size=64, layers=2, heads=2, tie_embeddings=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim == 2 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def server(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp("model")
    weights.save_pretrained(folder)
    make_tokenizer("qwen3").save_pretrained(folder)
    flags: dict[str, str | int] = {"dtype": "float32", "max-model-len": 1024}
    logs = tmp_path_factory.mktemp("logs")
    with start_server(str(folder), logs, flags, ("--enforce-eager",)) as running:
        yield running


@pytest.fixture(scope="module", params=VARIABLES)
def played(
    request: pytest.FixtureRequest, server: VllmServer, tmp_path_factory: pytest.TempPathFactory
) -> Played:
    """Play pairs that fork at each turn, 16 dialogues at a time, with ids in and ids out."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(request.param)
    tokenizer.save_pretrained(folder)
    # A random model seldom samples the end of a turn by itself: further ids end one too.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(40, 60)]}))
    chat = load_chat(str(folder), DATE, template_kwargs=VARIABLES[request.param])
    system = Message(role="system", content="Be brief.")
    jobs = [
        Job(Prompt(f"p{n}", [system, Message(role="user", content=f"Hi {n}.")]), plan)
        for n, plan in enumerate(Plan(2, n % TURNS, TURNS - 1) for n in range(2 * TURNS))
    ]
    rollouts: list[Rollout] = []

    async def play() -> None:
        options = EngineOptions(Rounds(), urls=(server.url,))
        engine = await asyncio.to_thread(open_engine, server.name, tokenizer, options)
        seat = table(
            engine,
            tokenizer,
            rollouts,
            chat=chat,
            context=TemplateContext(chat),
            environment=Asks(),
            sampling=Sampling(TEMPERATURE, 24),
        )
        try:
            await play_all(jobs, seat, 16)
        finally:
            await engine.close()

    asyncio.run(play())
    rows = [rollout_from_row(json.loads(json.dumps(rollout_row(done)))) for done in rollouts]
    assert sorted(row.key for row in rows) == [(f"p{n}", s) for n in range(10) for s in (0, 1)]
    assert {row.status for row in rows} == {"complete"}
    return Played(chat, sorted(rows, key=lambda row: row.key), server)


def contexts(rollout: Rollout) -> list[list[int]]:
    """Return what the record says that the policy saw at each turn."""
    context, seen = list[int](), []
    for turn in rollout.turns or []:
        seen.append(context[: turn.keep] + turn.prompt_ids)
        context = seen[-1] + turn.response_ids
    return seen


def test_the_recorded_contexts_are_what_the_server_reads_with_one_bos(played: Played) -> None:
    recorded = [context for rollout in played.rollouts for context in contexts(rollout)]
    body = {"model": played.server.name, "prompt": recorded, "max_tokens": 1}
    body |= {"return_token_ids": True, "add_special_tokens": False}
    answer = httpx.post(f"{played.server.url}/v1/completions", json=body, timeout=120.0).json()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [choice["prompt_token_ids"] for choice in choices] == recorded
    bos = played.chat.tokenizer.bos_token_id
    for rollout in played.rollouts:
        assert rollout.turns[0].prompt_ids[0] == bos or bos is None
        # A model may sample a BOS; nobody else writes one but the template at the start.
        written = [id_ for turn in rollout.turns for id_ in turn.prompt_ids]
        assert bos is None or written.count(bos) == 1
        assert all(context[0] == bos or bos is None for context in contexts(rollout))


def test_contexts_go_on_or_are_rewritten_as_the_template_does(played: Played) -> None:
    reasons = set()
    for rollout in played.rollouts:
        seen = contexts(rollout)
        for t in range(1, TURNS):
            before = seen[t - 1] + rollout.turns[t - 1].response_ids
            assert (rollout.turns[t].keep == len(before)) == played.chat.append_only
            reasons.add(rollout.turns[t].finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("layout", ["apart", "dense", "chains"])
def test_the_engines_logprobs_are_the_trainers(
    played: Played, weights: Any, layout: Layout
) -> None:
    turns = range(TURNS)
    examples: dict[str, Example] = {}
    expected = []
    for rollout in played.rollouts:
        sequence = sequence_of(rollout, turns, None)
        example = examples.setdefault(rollout.prompt_id, Example(rollout.prompt_id, {}))
        strand = Strand(sequence.ids, sequence.mask, sequence.segments)
        example.strands[str(rollout.sample)] = strand
        sampled = sample_logprob(rollout, turns)
        assert sampled is not None and len(sampled) == sequence.mask.sum()
        expected.append(sampled)
    policy = MaskedLogprobs(weights, TEMPERATURE)
    batch = collate(list(examples.values()), layout, torch.device("cpu"))
    with torch.no_grad():
        ours = policy(*batch.inputs).numpy()
    engines = np.concatenate(expected)
    assert len(ours) > 1000
    assert engines.std() > 1.0, "a model that likes all ids alike would agree with anything"
    assert np.abs(ours - engines).max() < 1e-4
