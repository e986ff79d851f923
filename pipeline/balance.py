"""Which examples share a forward pass, and which rank runs it. Every rank plans for all."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.packing import FLAT, Example, Layout, arrange

Size = tuple[int, int]
"""(rows, places of the longest row) of an example."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What fits one forward pass: places, padding included, and examples (0: no bound).

    `layout` is how examples are arranged in it.
    """

    tokens: int
    examples: int = 0
    layout: Layout = "apart"

    def holds(self, sizes: Sequence[Size]) -> bool:
        """Say whether these examples fit, the longest of them first."""
        if self.examples and len(sizes) > self.examples:
            return False
        return self.places(sizes) <= self.tokens

    def places(self, sizes: Sequence[Size]) -> int:
        """Return the places that these examples take, the longest of them first."""
        if self.layout in FLAT:
            return sum(width for _, width in sizes)
        return sum(rows for rows, _ in sizes) * sizes[0][1]


def sizes_of(examples: Sequence[Example], layout: Layout) -> list[Size]:
    """Return the size of each example in a layout."""
    rows = [arrange(example, layout) for example in examples]
    return [(len(one), max(len(row.ids) for row in one)) for one in rows]


def plan_micro_batches(sizes: Sequence[Size], budget: Budget, world: int) -> list[list[list[int]]]:
    """Deal examples to ranks: a list of micro-batches (of indices) for each rank.

    Longest first, so that rows of like length meet and the largest pass comes first; an example
    larger than the budget has a pass to itself. Every rank gets the same number of micro-batches,
    and like-sized ones at the same time; an empty one is a filler.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i))
    count = len(_fill(order, sizes, budget))
    even = -(-count // world) * world
    # Not the fullest passes but as even ones as this number of them allows.
    tokens = bisect_left(
        range(budget.tokens),
        True,
        key=lambda tokens: len(_fill(order, sizes, replace(budget, tokens=tokens))) <= even,
    )
    batches = _fill(order, sizes, replace(budget, tokens=tokens))
    batches = _pad(batches, sizes, budget, world)
    dealt = [batches[i : i + world] for i in range(0, len(batches), world)]
    turns = [one if k % 2 == 0 else one[::-1] for k, one in enumerate(dealt)]
    return [[turn[rank] for turn in turns] for rank in range(world)]


def _fill(order: Sequence[int], sizes: Sequence[Size], budget: Budget) -> list[list[int]]:
    """Cut a descending order of widths into micro-batches that the budget holds."""
    batches: list[list[int]] = []
    held: list[Size] = []
    for i in order:
        held.append(sizes[i])
        if batches and budget.holds(held):
            batches[-1].append(i)
        else:
            batches.append([i])
            held = [sizes[i]]
    return batches


def _pad(
    batches: list[list[int]], sizes: Sequence[Size], budget: Budget, world: int
) -> list[list[int]]:
    """Halve the largest micro-batches until the ranks have equally many; pad with empty ones."""

    def cost(batch: list[int]) -> int:
        return budget.places([sizes[i] for i in batch])

    while len(batches) % world:
        divisible = [batch for batch in batches if len(batch) > 1]
        if not divisible:
            return batches + [[] for _ in range(-len(batches) % world)]
        largest = max(divisible, key=cost)
        at, half = batches.index(largest), (len(largest) + 1) // 2
        batches[at : at + 1] = [largest[:half], largest[half:]]
    return sorted(batches, key=cost, reverse=True)
