"""Time our trainer against the REFUEL script's way and TRL's DPOTrainer, on the same pairs.

python bench/train.py

On a CPU: a Llama of 20M parameters in float32, 24 pairs of realistic lengths, optimizer steps of 8
pairs, the ways by turns on each batch of pairs. The seed's rows have 2048 ids whatever is in them,
so two of its pairs in each batch tell the cost of all. On a GPU (the default where there is one):
the shapes of Llama-3.2-1B and 3B with random weights, in bf16, one way after the other. Memory is
the peak above model, gradients and optimizer, in a process of its own for each way. The last line
is JSON.
"""

import gc
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from _clocks import EAGER_MALLOC, PeakMemory, Stopwatch
from _ways import OurWay, SeedWay, Setup, Sums, Way
from _workload import SHAPES, Lengths, Shape, make_pairs, needed_flops, places, write_model
from transformers.utils import logging

# Dense bf16, by a part of the name that torch gives; from NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0}


@dataclass(frozen=True)
class Config:
    """What is measured."""

    device: str = "auto"
    """cpu or cuda; auto is cuda where there is one."""
    dtype: str = "auto"
    """fp32, or bf16 autocast over float32 weights; auto is bf16 on a GPU."""
    one_by_one: bool = False
    """Let each way have the machine for itself, as on a GPU; else they train by turns."""
    models: tuple[str, ...] = ()
    """Shapes: tiny, 20m, llama-3.2-1b, llama-3.2-3b; by the device when empty."""
    pairs: int = 24
    """Pairs that every way trains on once in each repeat."""
    batch_size: int = 8
    """Pairs of an optimizer step."""
    repeats: int = 1
    """How often each batch is timed; the median counts."""
    prefix: tuple[int, int] = Lengths.prefix
    """Ids of a pair's common prefix: least and most."""
    response: tuple[int, int] = Lengths.response
    """Ids of a response: least and most."""
    row: int = Lengths.row
    """Ids of a row of the seed."""
    threads: int = 2
    """Threads of torch on a CPU."""
    peak_tflops: float = 0.0
    """Dense TFLOP/s of the device, for its utilisation; known for H100, H200 and A100."""
    profile: bool = False
    """Show where a step of ours spends its time, and measure nothing else."""

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.cuda.is_available() if self.device == "auto" else self.device == "cuda"

    @property
    def precision(self) -> str:
        """The dtype with `auto` resolved."""
        return ("bf16" if self.on_gpu else "fp32") if self.dtype == "auto" else self.dtype

    def peak_flops(self) -> float:
        """Return what the device can do in a second; 0 where that isn't known."""
        name = torch.cuda.get_device_name() if self.on_gpu else ""
        known = [tflops for part, tflops in PEAK_TFLOPS.items() if part in name]
        return 1e12 * (self.peak_tflops or next(iter(known), 0.0))


def trl_way(setup: Setup) -> Way:
    """Make TRL's way; importing it takes seconds."""
    from _trl_way import TrlWay

    return TrlWay(setup)


# TRL first: when it starts, it resets the state that accelerate shares between its objects.
WAYS: dict[str, Callable[[Setup], Way]] = {
    "trl dpo": trl_way,
    "seed refuel": SeedWay,
    "our dpo": lambda setup: OurWay(setup, "dpo"),
    "our refuel": lambda setup: OurWay(setup, "refuel"),
}
SCORING = ("seed refuel", "our refuel")
WEIGHED = ("trl dpo", "seed refuel", "our refuel")
"""Ways whose memory is measured; DPO takes what REFUEL does."""
LOGPROBS = " (log-probs only)"


def main(config: Config) -> None:
    """Measure each model and print its table and its line of JSON."""
    torch.set_num_threads(config.threads)
    quieten()
    shapes = ("llama-3.2-1b", "llama-3.2-3b") if config.on_gpu else ("20m",)
    describe(config)
    for name in config.models or shapes:
        shape = SHAPES[name]
        lengths = Lengths(config.prefix, config.response, config.row)
        pairs = make_pairs(config.pairs, shape.vocabulary, lengths, seed=0)
        with tempfile.TemporaryDirectory() as temporary:
            setup = Setup(
                Path(temporary),
                pairs,
                config.batch_size,
                config.row,
                "cuda" if config.on_gpu else "cpu",
                config.precision,
                config.threads,
            )
            write_model(setup.folder, shape)
            if config.profile:
                print(profile_of(setup))
                continue
            result = measure(setup, shape, config)
        print(json.dumps(result), flush=True)


def quieten() -> None:
    """Show no progress bars."""
    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"


def describe(config: Config) -> None:
    """Print the machine, how busy it is, and the versions."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":")[1].strip() for line in cpus if line.startswith("model name")}
    cpu = ", ".join(sorted(names)) or platform.processor()
    print(f"{os.cpu_count()} x {cpu}, {config.threads} threads, load {os.getloadavg()[0]:.1f}")
    if config.on_gpu:
        print(torch.cuda.get_device_name())
    used = ("torch", "transformers", "accelerate", "trl")
    print(", ".join(f"{name} {metadata.version(name)}" for name in used), flush=True)


def measure(setup: Setup, shape: Shape, config: Config) -> dict[str, float]:
    """Time every way, measure its memory, print the table, return the ratios."""
    memory = {name: peak_memory(name, setup) for name in WEIGHED}
    alone = config.on_gpu or config.one_by_one
    seconds: dict[str, list[float]] = {}
    sums: dict[str, Sums] = {}
    for names in [[name] for name in WAYS] if alone else [list(WAYS)]:
        time_together(names, setup, config.repeats, seconds, sums)
        gc.collect()
        torch.cuda.empty_cache()
    refuse_different(sums, 1e-3 if setup.dtype == "fp32" else 1e-2)
    spread(seconds)
    rates = {work: len(setup.pairs) / sum(found) for work, found in seconds.items()}
    used = utilisation(setup, shape, rates, config.peak_flops())
    print_table(setup, rates, used, memory)
    found = ratios(rates, memory)
    return found | {"mfu": used["our refuel"]} if used else found


def time_together(
    names: list[str],
    setup: Setup,
    repeats: int,
    seconds: dict[str, list[float]],
    sums: dict[str, Sums],
) -> None:
    """Train by turns on every batch; add the seconds of each, and log-probs before the first."""
    every = list(range(len(setup.pairs)))
    batches = [every[at : at + setup.batch_size] for at in every[:: setup.batch_size]]
    ways = {name: WAYS[name](setup) for name in names}
    for name, way in ways.items():
        warm_up(way, setup)
        sums[name] = way.score(share_of(name, batches[0], setup), Stopwatch())
    for batch in batches:
        for work, found in time_batch(ways, batch, setup, repeats).items():
            seconds.setdefault(work, []).append(found)


def time_batch(
    ways: dict[str, Way], batch: list[int], setup: Setup, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each work on a whole batch, the ways by turns."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            chosen = share_of(name, batch, setup)
            works = {name: way.train}
            if name in SCORING:
                works[name + LOGPROBS] = way.score
            for work, run in works.items():
                watch = Stopwatch()
                run(chosen, watch)
                found.setdefault(work, []).append(watch.seconds * len(batch) / len(chosen))
    for work, values in found.items():
        print(f"  {work}: {', '.join(f'{value:.2f}' for value in values)} s", flush=True)
    return {work: statistics.median(values) for work, values in found.items()}


def share_of(name: str, batch: list[int], setup: Setup) -> list[int]:
    """Return the pairs of a batch that a way is timed on: all, or two of the seed's on a CPU."""
    return batch[:2] if name.startswith("seed") and setup.device == "cpu" else batch


def warm_up(way: Way, setup: Setup) -> None:
    """Take a step on the smallest pair: kernels are chosen, the optimizer has its state."""
    smallest = min(range(len(setup.pairs)), key=lambda i: places(setup.pairs[i]))
    way.train([smallest], Stopwatch())


def refuse_different(sums: dict[str, Sums], tolerance: float) -> None:
    """Raise unless all ways find the same log-probs: they'd not do the same work."""
    ours = sums["our refuel"]
    for name, theirs in sums.items():
        worst = max(abs(theirs[key] - ours[key]) / abs(ours[key]) for key in theirs)
        print(f"  log-probs of {name} and ours differ by {worst:.1e} (relative) at most")
        assert worst < tolerance, f"{name} computes something else"


def peak_memory(name: str, setup: Setup) -> int:
    """Return a way's peak, measured in a process of its own."""
    before = dict(os.environ)
    os.environ.update(EAGER_MALLOC)  # glibc reads them when the process starts
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(peak_here, name, setup).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def peak_here(name: str, setup: Setup) -> int:
    """Return a way's peak over a step on the largest pairs."""
    torch.set_num_threads(setup.threads)
    quieten()
    largest = sorted(range(len(setup.pairs)), key=lambda i: -places(setup.pairs[i]))
    chosen = share_of(name, largest[: setup.batch_size], setup)
    way = WAYS[name](setup)
    warm_up(way, setup)
    clock = PeakMemory(way.model.parameters)
    way.train(chosen, clock)
    return clock.peak_bytes


def ratios(rates: dict[str, float], memory: dict[str, int]) -> dict[str, float]:
    """Return what the benchmark is about."""
    found = {
        "pairs_per_s_vs_seed": rates["our refuel"] / rates["seed refuel"],
        "pairs_per_s_vs_trl": rates["our dpo"] / rates["trl dpo"],
        "peak_memory_vs_seed": memory["our refuel"] / memory["seed refuel"],
        "logprobs_vs_seed": rates["our refuel" + LOGPROBS] / rates["seed refuel" + LOGPROBS],
    }
    return {name: round(value, 3) for name, value in found.items()}


def spread(seconds: dict[str, list[float]]) -> None:
    """Print the ratios of the single batches: how much they differ."""
    for ours, theirs in [
        ("our refuel", "seed refuel"),
        ("our dpo", "trl dpo"),
        ("our refuel" + LOGPROBS, "seed refuel" + LOGPROBS),
    ]:
        found = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        print(f"  {ours} against {theirs}, by batch: {', '.join(f'{x:.2f}' for x in found)}")


def utilisation(
    setup: Setup, shape: Shape, rates: dict[str, float], peak_flops: float
) -> dict[str, float]:
    """Return the share of the device's FLOPs that `needed_flops` take, where they are known.

    What a way computes besides (padding, a prefix twice, logits that no loss reads) isn't counted.
    """
    if not peak_flops:
        return {}
    flops = statistics.mean(needed_flops(shape, pair) for pair in setup.pairs)
    trained = {work: rate for work, rate in rates.items() if not work.endswith(LOGPROBS)}
    return {work: round(flops * rate / peak_flops, 4) for work, rate in trained.items()}


def print_table(
    setup: Setup, rates: dict[str, float], used: dict[str, float], memory: dict[str, int]
) -> None:
    """Print each work's pairs and distinct ids a second, its utilisation and its memory."""
    ids = statistics.mean(map(places, setup.pairs))
    print("| way | pairs/s | distinct ids/s | MFU | peak memory, MB |")
    print("|---|---:|---:|---:|---:|")
    for work, rate in rates.items():
        share = f"{used[work]:.1%}" if work in used else ""
        peak = f"{memory[work] / 2**20:.0f}" if work in memory else ""
        print(f"| {work} | {rate:.3f} | {rate * ids:.0f} | {share} | {peak} |")


def profile_of(setup: Setup, rows: int = 15) -> str:
    """Return the operations that one step of ours spends most of its time in."""
    way = WAYS["our refuel"](setup)
    warm_up(way, setup)
    with torch.profiler.profile() as profiler:
        way.train(range(min(setup.batch_size, len(setup.pairs))), Stopwatch())
    on_gpu = setup.device == "cuda"
    spent = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total), event)
        for event in profiler.key_averages()
    }
    total = sum(us for us, _ in spent.values())
    lines = [f"one step of {setup.batch_size} pairs: {total / 1e6:.2f} s", "   ms share calls"]
    for us, event in sorted(spent.values(), key=lambda one: -one[0])[:rows]:
        lines.append(f"{us / 1e3:5.0f} {us / total:5.1%} {event.count:5d} {event.key}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
