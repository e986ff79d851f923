"""Rows -> the tensors of a forward pass.

Axes: B rows, T places of the longest row, U distinct predictions, N trained ids, M members.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.packing import FLAT, Branch, Example, Ids, Layout, Row, arrange, side_by_side

FLEX_STEP = 512
"""Rows for FlexAttention are padded to a multiple of so many places: few shapes to compile."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one forward pass. `sources_U` indexes the flattened [B*T] places.

    `copies_N` leads from each trained id to its prediction: members that share a trained id share
    the prediction. `branches` are those of each row, None where rows are plain; then positions
    count from 0.

    A member's trained ids are in the order of its mask, and the members in example order;
    `members` gives the indices (0..M-1) of the members of each role. `counted` is False for the
    filler of a rank that has nothing left: its loss has weight 0.
    """

    ids_BT: Tensor
    sources_U: Tensor
    targets_U: Tensor
    copies_N: Tensor
    positions_BT: Tensor | None
    branches: list[tuple[Branch, ...]] | None
    owners_N: Tensor
    rewards_M: Tensor
    numbers_N: dict[str, Tensor]
    members: dict[str, Tensor]
    prompt_ids: list[str]
    tokens: int
    counted: bool

    @property
    def inputs(self) -> tuple[object, ...]:
        """What the policy's forward takes, in its order."""
        predictions = (self.sources_U, self.targets_U, self.copies_N)
        return (self.ids_BT, *predictions, self.positions_BT, self.branches)


def collate(
    examples: Sequence[Example], layout: Layout, device: torch.device, counted: bool = True
) -> MicroBatch:
    """Turn examples into the tensors of one forward pass."""
    rows = laid_out(examples, layout)
    strands = [strand for example in examples for strand in example.strands.values()]
    roles: dict[str, list[int]] = {}
    for at, role in enumerate(role for example in examples for role in example.strands):
        roles.setdefault(role, []).append(at)
    ids_BT, positions_BT, branches = row_tensors(rows, layout, device)

    def on_device(values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device)

    def joined(name: str) -> Tensor:
        return on_device(np.concatenate([strand.numbers[name] for strand in strands]))

    sources, targets, copies = predictions(rows)
    return MicroBatch(
        ids_BT=ids_BT,
        sources_U=on_device(sources),
        targets_U=on_device(targets),
        copies_N=on_device(copies),
        positions_BT=positions_BT,
        branches=branches,
        owners_N=on_device(np.concatenate([row.owners for row in rows])),
        rewards_M=torch.tensor([s.reward for s in strands], dtype=torch.float64, device=device),
        numbers_N={name: joined(name) for name in strands[0].numbers},
        members={role: torch.tensor(at, device=device) for role, at in roles.items()},
        prompt_ids=[example.prompt_id for example in examples],
        tokens=sum(len(row.ids) for row in rows),
        counted=counted,
    )


def row_tensors(
    rows: Sequence[Row], layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor | None, list[tuple[Branch, ...]] | None]:
    """Return (ids_BT, positions_BT, branches) of rows; the latter are None where rows are plain."""
    step = FLEX_STEP if layout == "flex" else 1
    # The pad id is any id of the vocabulary: no place that is read attends to it.
    ids_BT = torch.from_numpy(padded([row.ids for row in rows], step)).to(device)
    if layout not in FLAT and all(len(row.branches) == 1 for row in rows):
        return ids_BT, None, None
    positions_BT = torch.from_numpy(padded([row.positions for row in rows], step)).to(device)
    return ids_BT, positions_BT, [row.branches for row in rows]


def laid_out(examples: Sequence[Example], layout: Layout) -> list[Row]:
    """Return the rows of a micro-batch; their owners count its members."""
    rows: list[Row] = []
    members = 0
    for example in examples:
        arranged = arrange(example, layout)
        rows += [replace(row, owners=row.owners + members) for row in arranged]
        members += len(example.strands)
    return [side_by_side(rows)] if layout in FLAT else rows


def predictions(rows: Sequence[Row]) -> tuple[Ids, Ids, Ids]:
    """Return (sources_U, targets_U, copies_N): each prediction once, and where it is used."""
    width = max(len(row.ids) for row in rows)
    sources = np.concatenate([row.sources + b * width for b, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    keys, copies = np.unique(sources << 32 | targets, return_inverse=True)
    return keys >> 32, keys & 0xFFFFFFFF, copies


def padded(rows: Sequence[Ids], step: int = 1) -> Ids:
    """Stack rows, filled with 0 on the right to a multiple of `step`: values_BT."""
    width = -(-max(len(row) for row in rows) // step) * step
    values_BT = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        values_BT[b, : len(row)] = row
    return values_BT
