"""Write a ranked repo of many rollouts: `many_rollouts.py FOLDER ROLLOUTS`.

Two a prompt, five turns, about 1,000 ids and 5 kB of text each, in memory that doesn't grow.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from pipeline import store  # noqa: E402 - a script of its own finds the library first
from pipeline.records import RANKED  # noqa: E402
from small_repos import Config  # noqa: E402

TURNS, BATCH_PROMPTS = 5, 128


def turn(rng: np.random.Generator, keep: int, prompt: list[int]) -> dict[str, object]:
    said = np.minimum(rng.zipf(1.2, int(rng.integers(80, 180))), 127_999)
    logprobs = -rng.exponential(0.7, len(said)).astype(np.float32)
    told = {"keep": keep, "prompt_ids": prompt, "response_ids": said, "logprobs": logprobs}
    return told | {"finish_reason": "stop"}


def rollout(rng: np.random.Generator, name: str, sample: int, fork: int) -> dict[str, object]:
    shared = np.random.default_rng([int(name, 16), 1])
    turns: list[dict[str, object]] = []
    messages, keep = [], 0
    for t in range(TURNS):
        source = shared if t < fork else rng
        prompt = (shared if t <= fork else rng).integers(0, 128_000, 70).tolist()
        turns.append(turn(source, keep, prompt))
        keep += 70 + len(turns[-1]["response_ids"])  # type: ignore[arg-type]
        text = rng.bytes(250).hex()
        messages += [{"role": role, "content": text} for role in ("user", "assistant")]
    return {
        "prompt_id": name,
        "sample": sample,
        "messages": messages,
        "turns": turns,
        "branch_turn": fork,
        "score_turn": TURNS - 1,
        "status": "complete",
        "end_reason": "turns",
        "info": "{}",
        "rewards": rng.normal(size=TURNS).tolist(),
        "reward_errors": [None] * TURNS,
        "reward_parts": [],
        "reward_model": "made up",
    }


def batches(rollouts: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(0)
    for first in range(0, rollouts // 2, BATCH_PROMPTS):
        numbers = range(first, min(first + BATCH_PROMPTS, rollouts // 2))
        rows = [rollout(rng, f"{p:024x}", s, p % TURNS) for p in numbers for s in range(2)]
        yield pa.RecordBatch.from_pylist(rows, schema=RANKED)


if __name__ == "__main__":
    run = store.begin("rank", "ranked", Config(), sys.argv[1], seed=7)
    run.write({"train": batches(int(sys.argv[2]))}, counts={})
