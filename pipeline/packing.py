"""Examples -> rows with shared prefixes.

A row is a forest of branches: each sees the beginnings of the earlier branches that lead to it, and
its own ids causally. The rollouts of a pair are [prefix a][b], where b sees the prefix; those of a
group and the segments of a rewritten context are further branches. A row says where the hidden
state of each trained id is (`sources`) and which id it predicts (`targets`), so a layout decides
alone how ids are arranged:

- `apart`: a row for each context of each member. The reference: plain causal attention.
- `dense`: a row for each example, where that saves enough, under a dense mask.
- `chains`: the whole micro-batch in one row without padding, attention branch by branch.
- `flex`: the same row under a block mask of FlexAttention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.records import FloatArray, IntArray, MaskArray, Segment

Ids = npt.NDArray[np.int64]
Path = tuple[tuple[int, int], ...]
"""What a row reads: (branch, how many of its first ids), one after the other."""
Layout = Literal["apart", "dense", "chains", "flex"]
FLAT = ("chains", "flex")
"""Layouts of one row for a whole micro-batch."""


@dataclass(frozen=True, slots=True)
class Strand:
    """One member of an example: its ids, which of them train, and the numbers that losses read.

    `numbers` holds one float32 for each masked id under each name (`old_logprob`, `advantage`).
    """

    ids: IntArray
    mask: MaskArray
    segments: Sequence[Segment]
    reward: float = 0.0
    numbers: dict[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """What a loss takes at once: the members of a pair by role, or one rollout.

    `prompt_id` names it in errors.
    """

    prompt_id: str
    strands: dict[str, Strand]

    @property
    def trained(self) -> int:
        """How many ids train, over all members."""
        return sum(int(strand.mask.sum()) for strand in self.strands.values())


@dataclass(frozen=True, slots=True)
class Branch:
    """Places `start` to `stop` of a row, which see the `context` and themselves causally."""

    start: int
    stop: int
    context: Path = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Ids of one row; the hidden state at `sources[i]` predicts the id `targets[i]`.

    `owners`: the member that each target belongs to. `positions`: how many ids each id sees before
    itself.
    """

    ids: Ids
    positions: Ids
    branches: tuple[Branch, ...]
    sources: Ids
    targets: Ids
    owners: Ids


def member_rows(example: Example) -> list[Row]:
    """Lay out an example without sharing: a row for each context of each member."""
    return [
        row
        for owner, strand in enumerate(example.strands.values())
        for row in strand_rows(strand, owner, example.prompt_id)
    ]


def strand_rows(strand: Strand, owner: int, prompt_id: str) -> Iterator[Row]:
    """Yield a row for each segment with trained ids: its context, then its ids.

    Ids after the last source are left out, for nothing reads them.
    """
    context = np.empty(0, dtype=np.int64)
    for segment in strand.segments:
        stop = segment.start + segment.length
        kept = min(segment.keep, len(context))
        ids = np.concatenate([context[:kept], strand.ids[segment.start : stop]])
        targets = np.flatnonzero(strand.mask[segment.start : stop]) + kept
        if len(targets):
            if targets[0] == 0:
                raise DataError(f"prompt {prompt_id}: the first id of a sequence can't be trained")
            length = int(targets[-1])
            whole, owners = (Branch(0, length),), np.full(len(targets), owner)
            yield Row(ids[:length], np.arange(length), whole, targets - 1, ids[targets], owners)
        context = ids


def grow(rows: Sequence[Row]) -> Row:
    """Join the rows of an example: each is a branch behind the longest beginning it shares.

    The first id of a branch is predicted from the last place of what it shares. Less than an eighth
    of what follows isn't shared: attention over a context costs a branch more than that saves.
    """
    branches: list[Branch] = []
    paths: list[Path] = []
    tails: list[int] = []  # where in each row its own branch begins
    for k, row in enumerate(rows):
        lengths = [common_beginning(row.ids, other.ids) for other in rows[:k]]
        shared = max(lengths, default=0)
        if shared * 8 < len(row.ids) - shared:
            shared = 0
        path = beginning(paths[lengths.index(shared)], shared) if shared else ()
        if own := len(row.ids) - shared:
            start = branches[-1].stop if branches else 0
            branches.append(Branch(start, start + own, path))
            path = (*path, (len(branches) - 1, own))
        paths.append(path)
        tails.append(shared)
    places = [places_of(path, branches) for path in paths]
    return Row(
        ids=np.concatenate([row.ids[t:] for row, t in zip(rows, tails, strict=True)]),
        positions=np.concatenate([row.positions[t:] for row, t in zip(rows, tails, strict=True)]),
        branches=tuple(branches),
        sources=np.concatenate([p[row.sources] for p, row in zip(places, rows, strict=True)]),
        targets=np.concatenate([row.targets for row in rows]),
        owners=np.concatenate([row.owners for row in rows]),
    )


def common_beginning(left: Ids, right: Ids) -> int:
    """Return how many first ids two rows have in common."""
    shorter = min(len(left), len(right))
    differing = left[:shorter] != right[:shorter]
    at = int(differing.argmax()) if shorter else 0
    return at if shorter and differing[at] else shorter


def beginning(path: Path, length: int) -> Path:
    """Cut a path to its first ids."""
    kept: list[tuple[int, int]] = []
    for branch, ids in path:
        if length <= 0:
            break
        kept.append((branch, min(ids, length)))
        length -= ids
    return tuple(kept)


def places_of(path: Path, branches: Sequence[Branch]) -> Ids:
    """Return the places of a row that a path leads through."""
    return np.concatenate(
        [np.arange(branches[b].start, branches[b].start + ids) for b, ids in path]
    )


def side_by_side(rows: Sequence[Row]) -> Row:
    """Put rows into one; none sees another."""
    places = np.cumsum([0, *(len(row.ids) for row in rows)])
    counts = np.cumsum([0, *(len(row.branches) for row in rows)])
    return Row(
        ids=np.concatenate([row.ids for row in rows]),
        positions=np.concatenate([row.positions for row in rows]),
        branches=tuple(
            Branch(b.start + p, b.stop + p, tuple((c + n, ids) for c, ids in b.context))
            for row, p, n in zip(rows, places.tolist(), counts.tolist(), strict=False)
            for b in row.branches
        ),
        sources=np.concatenate([r.sources + p for r, p in zip(rows, places, strict=False)]),
        targets=np.concatenate([row.targets for row in rows]),
        owners=np.concatenate([row.owners for row in rows]),
    )


def arrange(example: Example, layout: Layout) -> list[Row]:
    """Lay out one example.

    Under a dense mask, attention between branches is computed and thrown away: it must save a
    quarter of the places.
    """
    rows = member_rows(example)
    if layout == "apart":
        return rows
    grown = grow(rows)
    apart = sum(len(row.ids) for row in rows)
    return rows if layout == "dense" and len(grown.ids) > 0.75 * apart else [grown]


def longest_context(example: Example) -> int:
    """Return the ids of the longest context that the model reads at once."""
    strands = example.strands.values()
    if all(len(strand.segments) == 1 for strand in strands):
        return max(len(s.mask) - 1 - int(np.argmax(s.mask[::-1])) for s in strands)
    return max(len(row.ids) for row in member_rows(example))
