"""Generation through real vLLM servers on the CPU against the seed's way, tiny models for both."""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
from _seed_way import SeedWay
from _stage import generate
from _wired import texts_of, wired_tokenizer, write_policy, write_prompts, write_user

from pipeline.plans import plan_for
from pipeline.prompts import load_prompts

CONTEXT = 3072
MAX_TOKENS = 64


def measure_seed(work: Path, count: int, turns: int, threads: int) -> dict[str, float]:
    """Measure both ways from start to end, loads included; return theirs by ours."""
    work.mkdir(parents=True, exist_ok=True)
    prompts = work / "prompts.jsonl"
    print(f"seed: {write_prompts(prompts, count)}, {turns} turns")
    tokenizer = wired_tokenizer(texts_of(prompts), CONTEXT)
    models = write_policy(work / "policy", tokenizer), write_user(work / "user", tokenizer)
    env = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Else both servers pin their threads to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    ours_s = play_ours(work / "ours", models, prompts, (count, turns), env)
    theirs_s = play_theirs(work / "theirs", models, prompts, (count, turns), env)
    return {"wall_vs_seed": round(theirs_s / ours_s, 2)}


def play_ours(
    work: Path,
    models: tuple[Path, Path],
    prompts: Path,
    size: tuple[int, int],
    env: dict[str, str],
) -> float:
    """Run the stage, which starts both servers; return its seconds."""
    taken = generate(
        work,
        env,
        model=models[0],
        user_model=models[1],
        dataset=prompts,
        num_data=size[0],
        num_turns=size[1],
        maxlen=MAX_TOKENS,
        engine="vllm",
        dtype="float32",
        server_args="--enforce-eager",
    )
    rows = pq.read_table(work / "out" / "data").to_pylist()
    said = sum(len(row["turns"]) for row in rows)
    print(f"ours: {taken.wall_s:.1f} s, {len(rows)} rollouts, {said} policy turns in them")
    return taken.wall_s


def play_theirs(
    work: Path,
    models: tuple[Path, Path],
    prompts: Path,
    size: tuple[int, int],
    env: dict[str, str],
) -> float:
    """Play the seed's way; return its seconds."""
    work.mkdir(parents=True, exist_ok=True)
    settings = work / "settings.json"
    # Chunked prefill is off as in our servers: with seeds it ends vLLM's CPU build.
    engine = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
    sampling = {"temperature": 0.8, "max_tokens": MAX_TOKENS, "seed": 0}
    settings.write_text(json.dumps({"engine": engine, "sampling": sampling}))
    root = str(Path(__file__).parents[1])
    way = SeedWay(*models, settings, size[1], work, {**os.environ, **env, "PYTHONPATH": root})
    kept = list(load_prompts(str(prompts), "train", size[0], 0, False))
    branch_turns = [
        plan_for("refuel", 0, prompt.prompt_id, size[1], 2).branch_turn or 0 for prompt in kept
    ]
    started = time.perf_counter()
    first, second = way.play([prompt.messages for prompt in kept], branch_turns)
    wall_s = time.perf_counter() - started
    assert {len(messages) for messages in [*first, *second]} == {2 * size[1]}
    print(f"the seed's way: {wall_s:.1f} s in {way.loads} loads, {2 * len(first)} rollouts")
    return wall_s
