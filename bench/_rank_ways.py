"""The seed's way and ours to score the same rollouts with the same ArmoRM.

A way takes a block of chunks, and adds its seconds and scores to what was found.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _clocks import PeakMemory, Stopwatch
from _seed_rank import SeedRank

from pipeline.records import ROLLOUTS, Rollout
from pipeline.repos import open_repo, read_rollouts
from pipeline.rewards import Settings, load_reward
from pipeline.rows import rollout_row
from pipeline.scoring import Chunk, score_chunks

Scores = dict[tuple[str, int], list[float | None]]
"""By the rollout's key; None where a turn wasn't asked for."""
RANK = Path(__file__).parents[1] / "stages" / "rank.py"

TRIES = 4
"""Of each count of threads; the first ones only warm up."""


@dataclass(frozen=True)
class Setup:
    """What the ways share. `seed_every`: the seed scores one prompt in so many."""

    folder: Path
    turns: int
    device: str
    dtype: str
    threads: int
    seed_every: int
    max_tokens_per_batch: int


@dataclass
class Found:
    """By work: the seconds of each block, the processor's of all, the scores; the peak of ours."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    scores: dict[str, Scores] = field(default_factory=lambda: defaultdict(dict))
    peak_bytes: int = 0

    @contextmanager
    def timing(self, work: str) -> Iterator[None]:
        """Time a block."""
        watch, cpu_s = Stopwatch(), time.process_time()
        watch.start()
        yield
        watch.stop()
        self.seconds[work].append(watch.seconds)
        self.cpu_s[work] += time.process_time() - cpu_s

    def last(self) -> str:
        """Say what the last block took."""
        return ", ".join(f"{work} {values[-1]:.1f} s" for work, values in self.seconds.items())


class SeedWay:
    """One prefix at a time, with as many threads as are fastest for that."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""
        self.setup = setup
        self.model = SeedRank(setup.folder, setup.device, setup.dtype)
        self.threads = setup.threads

    def warm_up(self, first: Chunk) -> None:
        """Score a dialogue some times, and take the threads that were fastest at it."""
        rollout = first.rollouts[-1]
        counts = sorted({1, self.threads})
        tries = [(self._tried(count, rollout), count) for _ in range(TRIES) for count in counts]
        _, self.threads = min(tries[len(counts) :])
        print(f"threads of the seed's way: {self.threads}", flush=True)

    def _tried(self, threads: int, rollout: Rollout) -> float:
        torch.set_num_threads(threads)
        seconds, _ = timed(lambda: self.model.rank(rollout.messages, self.setup.turns))
        return seconds

    def run(self, block: Sequence[Chunk], found: Found) -> None:
        """Score every turn of its share of the block."""
        torch.set_num_threads(self.threads)
        with found.timing("seed"):
            for rollout in seed_share(block, self.setup.seed_every):
                scores = self.model.rank(rollout.messages, self.setup.turns)
                found.scores["seed"][rollout.key] = list(scores)


class OurWay:
    """The stage's own loop over chunks, all turns and then the needed ones."""

    def __init__(self, setup: Setup) -> None:
        """Load the model, which probes itself."""
        torch.set_num_threads(setup.threads)
        self.setup = setup
        settings = Settings(
            dtype=setup.dtype,
            device=setup.device,
            max_tokens_per_batch=setup.max_tokens_per_batch,
        )
        self.model = load_reward(str(setup.folder), settings)

    def warm_up(self, first: Chunk) -> None:
        """Score a chunk."""
        list(score_chunks(self.model, [first], "needed"))

    def run(self, block: Sequence[Chunk], found: Found) -> None:
        """Score the block twice."""
        torch.set_num_threads(self.setup.threads)
        for which in ("all", "needed"):
            # The model is there before: what is counted is what it takes to score.
            peak = PeakMemory(lambda: ())
            peak.start()
            with found.timing(which):
                for chunk, records in score_chunks(self.model, block, which):
                    keys = [rollout.key for rollout in chunk.rollouts]
                    rewards = [record["rewards"] for record in records]
                    found.scores[which] |= dict(zip(keys, rewards, strict=True))
            peak.stop()
            found.peak_bytes = max(found.peak_bytes, peak.peak_bytes)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that something takes, and what it gives."""
    watch = Stopwatch()
    watch.start()
    result = work()
    watch.stop()
    return watch.seconds, result


def seed_share(block: Sequence[Chunk], every: int) -> list[Rollout]:
    """Return the rollouts of one prompt in so many of some chunks, beginning with the first."""
    rollouts = [rollout for chunk in block for rollout in chunk.rollouts]
    prompts = list(dict.fromkeys(rollout.prompt_id for rollout in rollouts))
    chosen = set(prompts[::every])
    return [rollout for rollout in rollouts if rollout.prompt_id in chosen]


def run_stage(setup: Setup, rollouts: Sequence[Rollout], work: Path) -> tuple[float, Scores]:
    """Run stages/rank.py on a repo of the rollouts; return its seconds and its scores."""
    prompts, output = work / "rollouts", work / "ranked"
    (prompts / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([rollout_row(item) for item in rollouts], schema=ROLLOUTS)
    pq.write_table(table, prompts / "data" / "train-00000-of-00001.parquet")
    flags = {
        "prompts": prompts,
        "reward_model": setup.folder,
        "output_repo": output,
        "device": setup.device,
        "dtype": setup.dtype,
        "max_tokens_per_batch": setup.max_tokens_per_batch,
    }
    command = [sys.executable, str(RANK), *(f"--{name}={value}" for name, value in flags.items())]
    env = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
    return seconds, {item.key: item.rewards or [] for item in read_rollouts(open_repo(str(output)))}
