"""Ranking by rule takes as much memory for a hundred thousand rollouts as for two thousand."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import ROLLOUTS, Message, Rollout, Turn
from pipeline.rows import rollout_row

ROOT = Path(__file__).parents[1]
MEASURE = """
import resource, sys
from stages.rank import Config, main
main(Config(sys.argv[1], "rule:length", sys.argv[2], turns="all"))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write(folder: Path, rows: int) -> Path:
    """Write so many rollouts of three turns, a row group at a time."""
    (folder / "data").mkdir(parents=True)
    path = folder / "data" / "train-00000-of-00001.parquet"
    with pq.ParquetWriter(path, ROLLOUTS) as writer:
        for start in range(0, rows, 500):
            group = [rollout_row(rollout(row)) for row in range(start, start + 500)]
            writer.write_table(pa.Table.from_pylist(group, schema=ROLLOUTS))
    return folder


def rollout(row: int) -> Rollout:
    messages = []
    for turn in range(3):
        messages.append(Message(role="user", content=f"question {row} {turn}"))
        messages.append(Message(role="assistant", content="word " * (row * 7 % 91 + 1)))
    turns = [Turn(0, list(range(20)), list(range(60)), [-0.5] * 60, "stop") for _ in range(3)]
    return Rollout(f"p{row // 2:06d}", row % 2, messages, turns, 0, 2, "complete", "score_turn")


def peak(folder: Path, rows: int) -> int:
    prompts = write(folder / f"rollouts{rows}", rows)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(prompts), str(folder / f"ranked{rows}")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.rpartition("peak ")[2])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    small, large = peak(tmp_path, 2_000), peak(tmp_path, 100_000)
    assert large < 1.15 * small
