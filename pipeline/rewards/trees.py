"""Rollouts of a prompt -> one row in which what they have in common is read once.

A tree is a row of branches (pipeline/packing.py): the rollouts of a prompt share their beginning up
to the fork, and the passes that a rewriting template needs share whatever they begin with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pipeline.packing import FLAT, Branch, Layout, Row, grow


@dataclass(slots=True)
class Reading:
    """Ids to be read, and for each turn asked for the R positions that its score reads.

    `row`: the place of its rollout in the call; readings of one `prompt_id` may share a row.
    """

    row: int
    prompt_id: str
    ids: list[int]
    places: dict[int, list[int]]


@dataclass(frozen=True, slots=True)
class Tree:
    """Readings joined into one row, whose `sources` are their places one after the other."""

    readings: list[Reading]
    row: Row

    @property
    def size(self) -> int:
        """How many ids are read."""
        return len(self.row.ids)


def plant(readings: Sequence[Reading]) -> Tree:
    """Join readings: each is a branch behind the longest beginning that it shares."""
    return Tree(list(readings), grow([_row(reading) for reading in readings]))


def _row(reading: Reading) -> Row:
    ids = np.asarray(reading.ids, dtype=np.int64)
    sources = np.concatenate([np.asarray(p, dtype=np.int64) for p in reading.places.values()])
    nothing = np.zeros_like(sources)
    return Row(ids, np.arange(len(ids)), (Branch(0, len(ids)),), sources, nothing, nothing)


def trees(readings: Sequence[Reading], max_tokens: int, layout: Layout) -> list[Tree]:
    """Plant a tree for each prompt, or several where it has more than `max_tokens` ids.

    Layout `apart` shares nothing: a tree for each reading.
    """
    planted = []
    for _, of_prompt in groupby(sorted(readings, key=_prompt), key=_prompt):
        together: list[Reading] = []
        for reading in of_prompt:
            size = sum(len(other.ids) for other in together) + len(reading.ids)
            if together and (layout == "apart" or size > max_tokens):
                planted.append(plant(together))
                together = []
            together.append(reading)
        planted.append(plant(together))
    return planted


def _prompt(reading: Reading) -> str:
    return reading.prompt_id


def batches(planted: Sequence[Tree], max_tokens: int, layout: Layout) -> Iterator[list[Tree]]:
    """Fill batches with trees, longest first, up to `max_tokens` ids, padding included.

    Longest first: a batch that doesn't fit in memory shows itself at once. A tree larger than the
    budget is a batch of its own.
    """
    batch: list[Tree] = []
    taken = 0
    for tree in sorted(planted, key=lambda tree: -tree.size):
        # In padded rows each takes as much as the first, the longest.
        size = tree.size if layout in FLAT or not batch else batch[0].size
        if batch and taken + size > max_tokens:
            yield batch
            batch, taken, size = [], 0, tree.size
        batch.append(tree)
        taken += size
    if batch:
        yield batch


def halves(batch: Sequence[Tree]) -> list[list[Tree]]:
    """Cut a batch in two; a single tree is cut between its readings."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return [list(batch[:middle]), list(batch[middle:])]
    (tree,) = batch
    middle = len(tree.readings) // 2
    return [[plant(tree.readings[:middle])], [plant(tree.readings[middle:])]]
