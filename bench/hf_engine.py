"""Time the hf engine against one dialogue at a time through transformers' own generate.

python bench/hf_engine.py

The baseline is how REFUEL's setting-two script for UltraInteract rolls out: transformers'
`generate` with batch size one and a key-value cache, the whole context read again at each turn. At
its best settings: it stops at the end of turn, which that script doesn't. Both play the same games
with the same random policy, in this process, on the same number of threads. The last line is JSON.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from pipeline.admission import play_all
from pipeline.chat import Chat
from pipeline.engines.base import Sampling
from pipeline.engines.hf import HfEngine
from pipeline.engines.rounds import Rounds
from pipeline.environments.base import Dialogue, End
from pipeline.environments.guessing_game import GuessingGame, corpus
from pipeline.models import tiny_llama
from pipeline.plans import Plan
from pipeline.prompts import guessing_games
from pipeline.records import Prompt, Rollout
from pipeline.rollout import Job, Table, TemplateContext
from pipeline.tiny import make_tokenizer

TURNS = 5


@dataclass(frozen=True)
class Config:
    """What is measured."""

    games: int = 400
    """Dialogues of five turns."""
    hidden_size: int = 96
    """Width of the policy."""
    max_tokens: int = 8
    """Most new ids of a turn."""
    threads: int = 2
    """Threads of torch."""


def play_ours(prompts: list[Prompt], model: Any, chat: Chat, sampling: Sampling) -> list[Rollout]:
    """Play all the games through the rounds of the hf engine."""
    finished: list[Rollout] = []
    rounds = Rounds()
    table = Table(
        run_seed=0,
        engine=HfEngine(model, rounds, max_batch_tokens=131072, max_rows=512),
        chat=chat,
        sampling=sampling,
        context=TemplateContext(chat),
        environment=GuessingGame(),
        rounds=rounds,
        finished=finished.append,
    )
    jobs = [Job(prompt, Plan(1, None, TURNS - 1)) for prompt in prompts]
    asyncio.run(play_all(jobs, table, concurrency=512))
    return finished


@torch.inference_mode()
def play_one_by_one(prompts: list[Prompt], model: Any, chat: Chat, sampling: Sampling) -> int:
    """Play them one after the other with transformers' generate; return the turns played."""
    turns = 0
    environment = GuessingGame()
    for prompt in prompts:
        messages = list(prompt.messages)
        for _ in range(TURNS):
            ids = torch.tensor([chat.prompt(messages)])
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(chat.stop_ids),
                pad_token_id=chat.stop_ids[0],
            )[0, ids.shape[1] :]
            messages.append({"role": "assistant", "content": chat.decode(said.tolist())})
            dialogue = Dialogue(0, prompt.prompt_id, 0, messages, info=prompt.info)
            reply = asyncio.run(environment.reply(dialogue))
            messages += [] if isinstance(reply, End) else reply
            turns += 1
    return turns


def main(config: Config) -> None:
    """Measure both and print the ratio."""
    torch.set_num_threads(config.threads)
    tokenizer = make_tokenizer(corpus(), 512, 512)
    model = tiny_llama(tokenizer, seed=0, hidden_size=config.hidden_size, heads=3).eval()
    chat = Chat(tokenizer, "2026-01-01")
    sampling = Sampling(0.8, config.max_tokens)
    prompts = list(guessing_games("guessing_game", config.games, 0))
    play_ours(prompts[:8], model, chat, sampling)  # warm up both
    play_one_by_one(prompts[:2], model, chat, sampling)
    started = time.perf_counter()
    rollouts = play_ours(prompts, model, chat, sampling)
    ours_s = time.perf_counter() - started
    assert sum(len(rollout.turns or []) for rollout in rollouts) == TURNS * len(prompts)
    fewer = prompts[: max(len(prompts) // 8, 1)]
    started = time.perf_counter()
    baseline_turns = play_one_by_one(fewer, model, chat, sampling)
    baseline_s = time.perf_counter() - started
    ours, baseline = TURNS * len(prompts) / ours_s, baseline_turns / baseline_s
    print(f"hf engine in rounds: {ours:.1f} turns/s; one by one: {baseline:.1f} turns/s")
    result = {"turns_per_s_vs_one_by_one": round(ours / baseline, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Config))
