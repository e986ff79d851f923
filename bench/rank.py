"""Time our scoring against the seed's way: a pass for each prefix, at batch size one.

python bench/rank.py

An ArmoRM in the published layout with random weights, and REFUEL's pairs: two full dialogues a
prompt that part at policy turn h, of which turn L trains. The seed's rank.py scores every turn of
both. Ours is the stage's loop at default settings, for all turns and for the needed ones, and the
stage as a user runs it. On a CPU (float32, the 20m shape) the ways take turns on blocks of rows; on
a GPU (bfloat16, the 8b shape) each has the device for itself, and the seed's scores a share of the
rows. Loading is timed apart. Fails where the scores differ. The last line is JSON.
"""

import gc
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from _machine import describe, matmul_flops
from _rank_dialogues import Language, make_rollouts
from _rank_model import SHAPES, write_armorm
from _rank_report import Figures, differences, figures_of, print_figures, ratios
from _rank_ways import Found, OurWay, SeedWay, Setup, run_stage, timed
from _rank_work import pages, read, works_of
from transformers.utils import logging

from pipeline.records import Rollout
from pipeline.scoring import windows

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WAYS = {"ours": OurWay, "seed": SeedWay}


@dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: int = 200
    """Prompts; each has two rollouts."""
    turns: int = 5
    """Policy turns of a dialogue."""
    dialogue_ids: int = 1000
    """Ids of a dialogue, on average."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; auto is cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto is bfloat16 on a GPU."""
    shape: Literal["auto", "tiny", "20m", "8b"] = "auto"
    """The reward model's size; auto is 8b on a GPU and 20m on a CPU. 8b writes 15 GB to a temporary
    folder."""
    threads: int = 2
    """Threads of torch on a CPU; the seed's way takes one if it is faster so."""
    blocks: int = 5
    """How often the ways take turns on a CPU."""
    seed_every: int = 0
    """The seed's way scores one prompt in so many of a block, and its time for all of them follows
    from the FLOPs; 0 is 1 on a CPU and 4 on a GPU."""
    tolerance: float = 0.0
    """How far scores may be apart, relative to the score and at least to 1; 0 is 1e-4 in float32
    and 2e-2 in bfloat16."""
    max_tokens_per_batch: int = 0
    """As of stages/rank.py."""
    seed: int = 0
    """Of the dialogues."""
    as_on_gpu: bool = False
    """Measure on a CPU as on a GPU: one way after the other, with the same figures."""

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"

    @property
    def alone(self) -> bool:
        """Whether each way has the device for itself."""
        return self.on_gpu or self.as_on_gpu

    @property
    def size(self) -> str:
        """The shape with `auto` resolved."""
        return ("8b" if self.on_gpu else "20m") if self.shape == "auto" else self.shape

    def setup(self, folder: Path) -> Setup:
        """Return what the ways share, every `auto` resolved."""
        dtype = "bfloat16" if self.on_gpu else "float32"
        return Setup(
            folder,
            self.turns,
            "cuda" if self.on_gpu else "cpu",
            dtype if self.dtype == "auto" else self.dtype,
            self.threads,
            self.seed_every or (4 if self.on_gpu else 1),
            self.max_tokens_per_batch,
        )


def main(config: Config) -> None:
    """Measure, print the tables and one line of JSON; fail where the scores differ."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as temporary:
        setup = config.setup(Path(temporary) / "armorm")
        print(describe(setup.device, ("torch", "transformers")), flush=True)
        result, apart = measure(config, setup, Path(temporary))
    print(json.dumps(result), flush=True)
    allowed = config.tolerance or TOLERANCE[setup.dtype]
    if not apart <= allowed:
        sys.exit(f"the scores differ by {apart:.2g} relative to their size; {allowed:.2g} may be")


def measure(config: Config, setup: Setup, work: Path) -> tuple[dict[str, float], float]:
    """Return the figures, and how far scores are apart relative to their size."""
    shape = SHAPES[config.size]
    language = Language(shape.vocabulary, config.turns, config.dialogue_ids, config.seed)
    rollouts = make_rollouts(language, config.pairs)
    parameters = write_armorm(setup.folder, shape, language.tokenizer, setup.device, setup.dtype)
    written = sum(path.stat().st_size for path in setup.folder.glob("*.safetensors"))
    print(
        f"ArmoRM of {parameters:,} parameters, {shape.layer_parameters:,} in the layers, written as"
        f" {written / 1e9:.2f} GB; {setup.dtype} on {setup.device}",
        flush=True,
    )
    found = time_ways(config, setup, rollouts)
    stage_s, found.scores["stage"] = run_stage(setup, rollouts, work)
    print(f"stages/rank.py from its start to its repo, the needed turns: {stage_s:.1f} s")
    worst, apart = differences(found.scores)
    figures = counted(config, setup, rollouts, language, found)
    print_figures(figures)
    result = ratios(figures) | {"max_abs_difference": worst}
    return (result | on_device(figures, found, setup) if config.alone else result), apart


def time_ways(config: Config, setup: Setup, rollouts: list[Rollout]) -> Found:
    """Time all ways on every block: by turns, or each with the device for itself."""
    chunks = [chunk for window in windows(rollouts, "train") for chunk in window]
    count = 1 if config.alone else min(config.blocks, len(chunks))
    # Chunks are in order of length: every block gets some of all.
    blocks = [chunks[at::count] for at in range(count)]
    found = Found()
    for names in [[name] for name in WAYS] if config.alone else [list(WAYS)]:
        ways = {}
        for name in names:
            seconds, ways[name] = timed(partial(WAYS[name], setup))
            print(f"loaded in {seconds:.1f} s, which isn't counted: {name}", flush=True)
            ways[name].warm_up(chunks[0])
        for block in blocks:
            for way in ways.values():
                way.run(block, found)
            print(f"  {found.last()}", flush=True)
        del ways, way
        gc.collect()
        torch.cuda.empty_cache()
    return found


def counted(
    config: Config, setup: Setup, rollouts: list[Rollout], language: Language, found: Found
) -> Figures:
    """Count the work of each way, and find out how fast the device could be."""
    every = pages(rollouts, language.tokenizer)
    by_key = dict(zip((rollout.key for rollout in rollouts), every, strict=True))
    timed_work = read(end for key in found.scores["seed"] for end in by_key[key].ends)
    torch.set_num_threads(setup.threads)
    size = 8192 if config.on_gpu else 1024
    ceiling = matmul_flops(setup.device, getattr(torch, setup.dtype), size)
    print(f"a dialogue has {sum(len(page.ids) for page in every) / len(every):.0f} ids on average")
    return figures_of(
        SHAPES[config.size], len(rollouts), works_of(every), timed_work, found, ceiling
    )


def on_device(figures: Figures, found: Found, setup: Setup) -> dict[str, float]:
    """Return what is of interest where ours has a device for itself, of all turns."""
    weights = sum(path.stat().st_size for path in setup.folder.glob("*.safetensors"))
    return {
        "dialogues_per_s": round(figures.rollouts / figures.total_s("all"), 3),
        "matmul_share": round(figures.matmul_share("all"), 4),
        "peak_memory_gb": round((weights + found.peak_bytes) / 1e9, 3),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
