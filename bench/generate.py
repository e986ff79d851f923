"""Time generation against the seed's way, against the bound of its engines, and against nothing.

python bench/generate.py

`seed`: real vLLM servers on the CPU with tiny models, against REFUEL's generate.py at its best: a
process and a load of the model for each turn and party. `servers`: simulated servers with realistic
latencies, against the bound that the busier one sets and against turn barriers with free loads.
`overhead`: our own code, with engines that cost nothing. The last line is JSON.
"""

import json
import os
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import tyro
from _overhead_part import measure_overhead
from _seed_part import measure_seed
from _servers_part import measure_servers

Part = Literal["seed", "servers", "overhead"]


@dataclass(frozen=True)
class Config:
    """What is measured, and how large."""

    parts: tuple[Part, ...] = ("seed", "servers", "overhead")
    """Which parts to run."""
    seed_prompts: int = 32
    """Prompts of the part with real vLLM servers."""
    seed_turns: int = 5
    """Policy turns of a dialogue there."""
    threads: int = 1
    """OMP threads of each vLLM process."""
    server_prompts: int = 1000
    """Prompts of the part with simulated servers; each has two rollouts."""
    time_scale: float = 3.0
    """How many times faster than their latencies the simulated servers are."""
    concurrency: int = 384
    """Dialogues in play at the same time with simulated servers; the stage's default."""
    games: tuple[int, int] = (1000, 100_000)
    """Dialogues of two runs with the scripted engine."""
    http_dialogues: int = 1000
    """Dialogues played with servers that answer at once."""


def describe_machine() -> str:
    """Return what figures depend on."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    names = ("torch", "transformers", "aiohttp", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {cpu}; Python {platform.python_version()}, {versions}"


def main(config: Config) -> None:
    """Measure the parts and print one line of JSON."""
    print(describe_machine(), flush=True)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "seed" in config.parts:
            result |= measure_seed(
                work / "seed", config.seed_prompts, config.seed_turns, config.threads
            )
        if "servers" in config.parts:
            result |= measure_servers(
                work / "servers", config.server_prompts, config.time_scale, config.concurrency
            )
        if "overhead" in config.parts:
            result |= measure_overhead(work / "overhead", config.games, config.http_dialogues)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Config))
