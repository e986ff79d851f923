"""Small configs, rollouts and repos for the tests of the store and of cards."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import store
from pipeline.config import execution
from pipeline.records import RANKED, ROLLOUTS, Rollout, Turn
from pipeline.rows import rollout_row


@dataclass(frozen=True)
class Config:
    temperature: float = 0.8
    seed: int = 7
    output_repo: str = execution("./out")
    policy_url: str = execution("")


def rollout(index: int, **changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "prompt_id": f"p{index:04d}",
        "sample": index % 2,
        "messages": [
            {"role": "user", "content": f"question {index}"},
            {"role": "assistant", "content": f"answer {index}"},
        ],
        "turns": [Turn(0, [1, 2, index], [5, 6], [-0.5, -0.25], "stop")],
        "branch_turn": None,
        "score_turn": 0,
        "status": "complete",
        "end_reason": "turns",
    }
    return Rollout(**values | changes)


def rows(count: int) -> list[dict[str, Any]]:
    return [rollout_row(rollout(index)) for index in range(count)]


def table(count: int) -> pa.Table:
    return pa.Table.from_pylist(rows(count), schema=ROLLOUTS)


def ranked_table(rewards: list[list[float | None]]) -> pa.Table:
    ranked = [
        rollout(i, rewards=values, reward_errors=[None] * len(values), reward_model="m")
        for i, values in enumerate(rewards)
    ]
    return pa.Table.from_pylist([rollout_row(r) for r in ranked], schema=RANKED)


def batches(whole: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, whole.num_rows, size):
        yield from whole.slice(start, size).to_batches()


def write_rollouts(path: Path | str, count: int = 5, **options: Any) -> store.Repo:
    """Write a finished rollouts repo with `count` rows."""
    run = store.begin("generate", "rollouts", Config(), str(path), seed=7)
    return run.write({"train": table(count)}, counts={"prompts": count}, **options)


def shard_hashes(path: Path) -> dict[str, str]:
    from pipeline.manifest import sha256_of

    return {p.name: sha256_of(p) for p in sorted((path / "data").iterdir())}
