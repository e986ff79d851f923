"""Examples -> micro-batches: what is in a row, which rows share a pass, which rank runs it.

Axes: B rows, T ids of the longest row, N trained ids, M members, E examples of a micro-batch.

A row says where the hidden state of each trained id is (`sources`) and which id it predicts
(`targets`), so a layout decides alone how ids are arranged. This layout gives every member rows of
its own; they are padded on the right, where causal attention doesn't look.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.records import FloatArray, IntArray, MaskArray, Segment


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

    `prompt_id` names it in errors; `prefix_length` is a lower bound on the ids its members share.
    """

    prompt_id: str
    strands: dict[str, Strand]
    prefix_length: int = 0

    @property
    def trained(self) -> int:
        """How many ids train, over all members."""
        return sum(int(strand.mask.sum()) for strand in self.strands.values())


@dataclass(frozen=True, slots=True)
class Row:
    """Ids of one row; the hidden state at `sources[i]` predicts the id `targets[i]`.

    `owner` is the place of the member that these targets belong to, within its example.
    """

    ids: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    owner: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward pass. `sources_N` indexes the flattened [B*T] positions.

    A member's targets are in the order of its masked ids, and the members in example order;
    `members` gives the indices (0..M-1) of the members of each role. `counted` is False for the
    filler of a rank that has nothing left: its loss has weight 0.
    """

    ids_BT: Tensor
    sources_N: Tensor
    targets_N: Tensor
    owners_N: Tensor
    rewards_M: Tensor
    numbers_N: dict[str, Tensor]
    members: dict[str, Tensor]
    prompt_ids: list[str]
    tokens: int
    counted: bool


def rows_of(example: Example) -> list[Row]:
    """Lay out an example without sharing prefixes: one row for each segment that trains."""
    rows: list[Row] = []
    for owner, strand in enumerate(example.strands.values()):
        rows += strand_rows(strand, owner, example.prompt_id)
    return rows


def strand_rows(strand: Strand, owner: int, prompt_id: str) -> Iterator[Row]:
    """Yield a row for each segment with trained ids: its context, then its ids.

    Ids after the last source are left out, for nothing reads them.
    """
    context = np.empty(0, dtype=np.int64)
    for segment in strand.segments:
        stop = segment.start + segment.length
        kept = min(segment.keep, len(context))
        row = np.concatenate([context[:kept], strand.ids[segment.start : stop]])
        targets = np.flatnonzero(strand.mask[segment.start : stop]) + kept
        if len(targets):
            if targets[0] == 0:
                raise DataError(f"prompt {prompt_id}: the first id of a sequence can't be trained")
            yield Row(row[: targets[-1]], targets - 1, row[targets], owner)
        context = row


def widths(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Return (rows, ids of the longest row) of each example, without building the rows."""
    sizes = []
    for example in examples:
        if all(len(strand.segments) == 1 for strand in example.strands.values()):
            lengths = [_last(strand.mask) for strand in example.strands.values()]
        else:
            lengths = [len(row.ids) for row in rows_of(example)]
        sizes.append((len(lengths), max(lengths, default=0)))
    return sizes


def _last(mask: MaskArray) -> int:
    return len(mask) - 1 - int(np.argmax(mask[::-1]))


@dataclass(frozen=True, slots=True)
class Budget:
    """What fits one forward pass: padded ids, and examples (0: no bound)."""

    tokens: int
    examples: int = 0

    def holds(self, examples: int, rows: int, width: int) -> bool:
        """Say whether so many examples, of so many rows of this width, fit."""
        return rows * width <= self.tokens and (not self.examples or examples <= self.examples)


def plan_micro_batches(
    sizes: Sequence[tuple[int, int]], budget: Budget, world: int
) -> list[list[list[int]]]:
    """Deal examples of (rows, width) to ranks: a list of micro-batches (of indices) for each rank.

    Longest first, so that rows of like length meet and the largest pass comes first; an example
    larger than the budget has a pass to itself. Every rank gets the same number of micro-batches,
    and like-sized ones at the same time; an empty one is a filler. Every rank plans for all.
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
    batches = _pad(batches, sizes, world)
    dealt = [batches[i : i + world] for i in range(0, len(batches), world)]
    turns = [one if k % 2 == 0 else one[::-1] for k, one in enumerate(dealt)]
    return [[turn[rank] for turn in turns] for rank in range(world)]


def _fill(
    order: Sequence[int], sizes: Sequence[tuple[int, int]], budget: Budget
) -> list[list[int]]:
    """Cut a descending order of widths into micro-batches that the budget holds."""
    batches: list[list[int]] = []
    rows = width = 0
    for i in order:
        if batches and budget.holds(len(batches[-1]) + 1, rows + sizes[i][0], width):
            batches[-1].append(i)
            rows += sizes[i][0]
        else:
            batches.append([i])
            rows, width = sizes[i]
    return batches


def _pad(batches: list[list[int]], sizes: Sequence[tuple[int, int]], world: int) -> list[list[int]]:
    """Halve the largest micro-batches until the ranks have equally many; pad with empty ones."""

    def cost(batch: list[int]) -> int:
        return sum(sizes[i][0] for i in batch) * sizes[batch[0]][1]

    while len(batches) % world:
        divisible = [batch for batch in batches if len(batch) > 1]
        if not divisible:
            return batches + [[] for _ in range(-len(batches) % world)]
        largest = max(divisible, key=cost)
        at, half = batches.index(largest), (len(largest) + 1) // 2
        batches[at : at + 1] = [largest[:half], largest[half:]]
    return sorted(batches, key=cost, reverse=True)


def collate(examples: Sequence[Example], device: torch.device, counted: bool = True) -> MicroBatch:
    """Turn examples into the tensors of one forward pass."""
    rows: list[Row] = []
    owners: list[npt.NDArray[np.int64]] = []
    strands: list[Strand] = []
    roles: dict[str, list[int]] = {}
    for example in examples:
        for row in rows_of(example):
            rows.append(row)
            owners.append(np.full(len(row.targets), len(strands) + row.owner))
        for role, strand in example.strands.items():
            roles.setdefault(role, []).append(len(strands))
            strands.append(strand)
    width = max(len(row.ids) for row in rows)
    # The pad id is any id of the vocabulary: no position that is read attends to it.
    ids_BT = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = row.ids
    sources = [row.sources + b * width for b, row in enumerate(rows)]

    def joined(parts: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return MicroBatch(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        sources_N=joined(sources),
        targets_N=joined([row.targets for row in rows]),
        owners_N=joined(owners),
        rewards_M=torch.tensor([s.reward for s in strands], dtype=torch.float64, device=device),
        numbers_N={name: joined([s.numbers[name] for s in strands]) for name in strands[0].numbers},
        members={role: torch.tensor(at, device=device) for role, at in roles.items()},
        prompt_ids=[example.prompt_id for example in examples],
        tokens=sum(len(row.ids) for row in rows),
        counted=counted,
    )
