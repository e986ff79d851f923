"""Examples -> micro-batches: what is in a row, which rows share a pass, which rank runs it.

Axes: B rows, T ids of the longest row, N trained ids, M members, E examples of a micro-batch.

A row says where the hidden state of each trained id is (`sources`) and which id it predicts
(`targets`), so a layout decides alone how ids are arranged. There are two: a row for each member,
padded on the right where causal attention doesn't look, and one row for all members of an example,
[prefix][a][b], where no branch sees another. The first is the second's reference.
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

Ids = npt.NDArray[np.int64]


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

    `prompt_id` names it in errors. `shared`: how many first ids its members have in common and
    compute once, in one row; 0 gives each its own.
    """

    prompt_id: str
    strands: dict[str, Strand]
    shared: int = 0

    @property
    def trained(self) -> int:
        """How many ids train, over all members."""
        return sum(int(strand.mask.sum()) for strand in self.strands.values())


@dataclass(frozen=True, slots=True)
class Row:
    """Ids of one row; the hidden state at `sources[i]` predicts the id `targets[i]`.

    `owners`: the place, within the example, of the member that each target belongs to. `branches`:
    0 for ids that all later ones see, else the number of the branch that alone sees them; None
    where there is no branch. `positions` go with them.
    """

    ids: Ids
    sources: Ids
    targets: Ids
    owners: Ids
    branches: Ids | None = None
    positions: Ids | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward pass. `sources_N` indexes the flattened [B*T] positions.

    `sees_B1TT` says which positions each one attends to; None is plain causal attention, and then
    positions count from 0.

    A member's targets are in the order of its masked ids, and the members in example order;
    `members` gives the indices (0..M-1) of the members of each role. `counted` is False for the
    filler of a rank that has nothing left: its loss has weight 0.
    """

    ids_BT: Tensor
    sources_N: Tensor
    targets_N: Tensor
    positions_BT: Tensor | None
    sees_B1TT: Tensor | None
    owners_N: Tensor
    rewards_M: Tensor
    numbers_N: dict[str, Tensor]
    members: dict[str, Tensor]
    prompt_ids: list[str]
    tokens: int
    counted: bool

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the policy's forward takes, in its order."""
        return self.ids_BT, self.sources_N, self.targets_N, self.positions_BT, self.sees_B1TT


def rows_of(example: Example) -> list[Row]:
    """Lay out an example: one row with branches where ids are shared, else rows for each member."""
    rows = [
        row
        for owner, strand in enumerate(example.strands.values())
        for row in strand_rows(strand, owner, example.prompt_id)
    ]
    return [branched(rows, example.shared)] if example.shared else rows


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
            owners = np.full(len(targets), owner)
            yield Row(row[: targets[-1]], targets - 1, row[targets], owners)
        context = row


def branched(rows: Sequence[Row], shared: int) -> Row:
    """Join rows that begin with the same `shared` ids into [prefix][a][b]...

    The first id of a branch is predicted from the prefix's last position; a trained id inside the
    prefix counts for every member.
    """
    starts = np.cumsum([shared, *(len(row.ids) - shared for row in rows)])
    moved = [
        np.where(row.sources < shared, row.sources, row.sources - shared + start)
        for row, start in zip(rows, starts[:-1], strict=True)
    ]
    tails = [row.ids[shared:] for row in rows]
    return Row(
        ids=np.concatenate([rows[0].ids[:shared], *tails]),
        sources=np.concatenate(moved),
        targets=np.concatenate([row.targets for row in rows]),
        owners=np.concatenate([row.owners for row in rows]),
        branches=np.repeat(np.arange(len(rows) + 1), [shared, *map(len, tails)]),
        positions=np.concatenate(
            [np.arange(shared), *(np.arange(shared, len(row.ids)) for row in rows)]
        ),
    )


def share(example: Example) -> Example:
    """Let the members of an example share their common first ids, where that saves a quarter.

    With less in common the attention between branches, computed and masked, costs more than it
    saves. Rows of several segments stay apart.
    """
    strands = list(example.strands.values())
    if len(strands) < 2 or any(len(strand.segments) > 1 for strand in strands):
        return example
    lengths = [_last(strand.mask) for strand in strands]
    shared = min(lengths)
    for strand in strands[1:]:
        differing = np.flatnonzero(strands[0].ids[:shared] != strand.ids[:shared])
        shared = int(differing[0]) if len(differing) else shared
    together = shared + sum(length - shared for length in lengths)
    return replace(example, shared=shared) if together <= 0.75 * sum(lengths) else example


def widths(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Return (rows, ids of the longest row) of each example, without building plain rows."""
    sizes = []
    for example in examples:
        strands = example.strands.values()
        if all(len(strand.segments) == 1 for strand in strands):
            lengths = [_last(strand.mask) for strand in strands]
            if example.shared:
                lengths = [sum(lengths) - (len(lengths) - 1) * example.shared]
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
    owners: list[Ids] = []
    strands: list[Strand] = []
    roles: dict[str, list[int]] = {}
    for example in examples:
        for row in rows_of(example):
            rows.append(row)
            owners.append(row.owners + len(strands))
        for role, strand in example.strands.items():
            roles.setdefault(role, []).append(len(strands))
            strands.append(strand)
    width = max(len(row.ids) for row in rows)

    def joined(parts: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    # The pad id is any id of the vocabulary: no position that is read attends to it.
    ids_BT = torch.from_numpy(padded([row.ids for row in rows], width, 0)).to(device)
    positions_BT, sees_B1TT = attention(rows, width, device)
    return MicroBatch(
        ids_BT=ids_BT,
        sources_N=joined([row.sources + b * width for b, row in enumerate(rows)]),
        targets_N=joined([row.targets for row in rows]),
        positions_BT=positions_BT,
        sees_B1TT=sees_B1TT,
        owners_N=joined(owners),
        rewards_M=torch.tensor([s.reward for s in strands], dtype=torch.float64, device=device),
        numbers_N={name: joined([s.numbers[name] for s in strands]) for name in strands[0].numbers},
        members={role: torch.tensor(at, device=device) for role, at in roles.items()},
        prompt_ids=[example.prompt_id for example in examples],
        tokens=sum(len(row.ids) for row in rows),
        counted=counted,
    )


def padded(rows: Sequence[Ids], width: int, fill: int) -> Ids:
    """Stack rows, filled on the right: values_BT."""
    values_BT = np.full((len(rows), width), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        values_BT[b, : len(row)] = row
    return values_BT


def attention(
    rows: Sequence[Row], width: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return positions_BT and sees_B1TT, or (None, None) where no row has branches."""
    if all(row.branches is None for row in rows):
        return None, None
    branches = [np.zeros_like(r.ids) if r.branches is None else r.branches for r in rows]
    positions = [np.arange(len(r.ids)) if r.positions is None else r.positions for r in rows]
    # Padding is a branch of its own: nothing sees it, and it sees something itself, for a softmax
    # over nothing is NaN.
    branches_BT = torch.from_numpy(padded(branches, width, -1)).to(device)
    own_BTT = branches_BT[:, :, None] == branches_BT[:, None, :]
    sees_BTT = (own_BTT | (branches_BT[:, None, :] == 0)).tril()
    return torch.from_numpy(padded(positions, width, 0)).to(device), sees_BTT[:, None]
