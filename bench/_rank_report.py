"""What bench/rank.py found: tables, ratios beside the limits that the work sets, equal scores."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from _rank_ways import Found, Scores
from _rank_work import Work
from _workload import Shape


@dataclass(frozen=True)
class Figures:
    """`works`: what each way reads at the least, of all rollouts; `timed`: what the seed's read.

    `seconds` are of all rollouts, by block, and `cpu_s` those of the processor; `ceiling`: FLOP/s
    of a large product of matrices.
    """

    shape: Shape
    rollouts: int
    works: dict[str, Work]
    seconds: dict[str, list[float]]
    cpu_s: dict[str, float]
    ceiling: float

    def total_s(self, way: str) -> float:
        """Return the seconds of all blocks."""
        return sum(self.seconds[way])

    def ratio(self, way: str) -> float:
        """Return how many times faster than the seed's a way is."""
        return self.total_s("seed") / self.total_s(way)

    def matmul_share(self, way: str) -> float:
        """Return the share of the ceiling that the work takes, prefixes read once in ours."""
        return self._least(way).flops(self.shape) / self.total_s(way) / self.ceiling

    def _least(self, way: str) -> Work:
        return self.works.get(f"{way}, shared", self.works[way])


def figures_of(
    shape: Shape, rollouts: int, works: dict[str, Work], timed: Work, found: Found, ceiling: float
) -> Figures:
    """Put them together; the seed's time for all rollouts follows from the FLOPs of its share."""
    scale = works["seed"].flops(shape) / timed.flops(shape)
    seconds = dict(found.seconds) | {"seed": [scale * s for s in found.seconds["seed"]]}
    cpu_s = dict(found.cpu_s) | {"seed": scale * found.cpu_s["seed"]}
    return Figures(shape, rollouts, works, seconds, cpu_s, ceiling)


def print_figures(figures: Figures) -> None:
    """Print what was read how fast, and each ratio beside those of the ids and the FLOPs."""
    print(f"a product of matrices: {figures.ceiling / 1e9:.0f} GFLOP/s")
    print("| way | s | dialogues/s | ids | GFLOP | share of the product's speed |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, work in figures.works.items():
        seconds = figures.total_s(way.removesuffix(", shared"))
        flops = work.flops(figures.shape)
        print(
            f"| {way} | {seconds:.1f} | {figures.rollouts / seconds:.2f} | {work.ids}"
            f" | {flops / 1e9:.0f} | {flops / seconds / figures.ceiling:.1%} |"
        )
    for way in ("all", "needed"):
        _print_ratio(figures, way)


def _print_ratio(figures: Figures, way: str) -> None:
    ratio = figures.ratio(way)
    seed = figures.works["seed"]
    cpu = figures.cpu_s["seed"] / figures.cpu_s[way]
    print(
        f"{way} turns: {ratio:.2f} times the seed's way; {_by_block(figures, way)} by block;"
        f" {cpu:.2f} by processor time"
    )
    for name, label in ((way, "each rollout read whole"), (f"{way}, shared", "prefixes shared")):
        work = figures.works[name]
        ids = seed.ids / work.ids
        flops = seed.flops(figures.shape) / work.flops(figures.shape)
        print(
            f"  {label}: {ids:.2f} times fewer ids, {flops:.2f} times fewer FLOPs;"
            f" reached {ratio / ids:.0%} and {ratio / flops:.0%} of that"
        )


def _by_block(figures: Figures, way: str) -> str:
    both = zip(figures.seconds["seed"], figures.seconds[way], strict=True)
    return ", ".join(f"{theirs / ours:.2f}" for theirs, ours in both)


def ratios(figures: Figures) -> dict[str, float]:
    """Return what the benchmark is about."""
    return {
        "all_turns_vs_seed": round(figures.ratio("all"), 3),
        "needed_turns_vs_seed": round(figures.ratio("needed"), 3),
    }


def differences(scores: Mapping[str, Scores]) -> tuple[float, float]:
    """Compare every score of ours with the seed's; return the largest difference.

    First as it is, then relative to the score, or to 1 where that is larger. Where we have no score
    for what the seed scored, it's infinite.
    """
    seed = scores["seed"]
    worst, relative = 0.0, 0.0
    for name, ours in scores.items():
        if name == "seed":
            continue
        apart = [
            _apart(ours[key][turn], score)
            for key, expected in seed.items()
            for turn, score in enumerate(expected)
            if name == "all" or ours[key][turn] is not None
        ]
        assert apart, f"{name} has no score to compare"
        difference = max(value for value, _ in apart)
        print(f"  scores of {name} and the seed's differ by {difference:.1e} at most")
        worst = max(worst, difference)
        relative = max(relative, *(value / scale for value, scale in apart))
    spread = np.std([score for expected in seed.values() for score in expected])
    print(f"  the seed's scores have a standard deviation of {spread:.2g}")
    return worst, relative


def _apart(ours: float | None, seed: float | None) -> tuple[float, float]:
    assert seed is not None
    return (float("inf") if ours is None else abs(ours - seed)), max(1.0, abs(seed))
