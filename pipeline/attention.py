"""Attention over rows of branches, in the three ways that transformers' models take it.

Axes: B rows, T places of a row, Q places of a branch, K places that a branch sees, H heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.packing import Branch

CHAINS = "turnwise_chains"
"""Our own attention function, as `set_attn_implementation` knows it."""

# What an attention function is given that ours doesn't compute (Gemma 2, GPT-OSS).
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


def attention_inputs(
    branches: list[tuple[Branch, ...]] | None, ids_BT: Tensor, implementation: str
) -> dict[str, Any]:
    """Return what the backbone takes besides ids and positions, for its attention implementation.

    `branches` None is plain causal attention, exact for rows padded on the right.
    """
    if branches is None:
        return {"attention_mask": None}
    if implementation == CHAINS:
        return {"attention_mask": None, "chains": Chains(branches[0], ids_BT.device)}
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(branches, ids_BT)}
    sees_B1TT = dense_mask(branches, ids_BT.shape[1], ids_BT.device)
    if implementation == "eager":
        added_B1TT = torch.zeros(sees_B1TT.shape, device=ids_BT.device)
        blocked = torch.finfo(added_B1TT.dtype).min
        return {"attention_mask": added_B1TT.masked_fill(~sees_B1TT, blocked)}
    return {"attention_mask": sees_B1TT}


def numbered(
    branches: Sequence[Sequence[Branch]], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (branch_BT, limits_BRR): each place's branch, and where a branch's view of it ends.

    Place q sees place k <= q where `k < limits[branch[q], branch[k]]`. Padding is the last branch,
    which sees itself alone: a softmax over nothing is NaN.
    """
    most = max(len(row) for row in branches)
    branch_BT = torch.full((len(branches), width), most)
    limits_BRR = torch.zeros(len(branches), most + 1, most + 1, dtype=torch.long)
    limits_BRR[:, most, most] = width
    for b, row in enumerate(branches):
        for r, branch in enumerate(row):
            branch_BT[b, branch.start : branch.stop] = r
            limits_BRR[b, r, r] = branch.stop
            for earlier, ids in branch.context:
                limits_BRR[b, r, earlier] = row[earlier].start + ids
    return branch_BT.to(device), limits_BRR.to(device)


def dense_mask(branches: Sequence[Sequence[Branch]], width: int, device: torch.device) -> Tensor:
    """Return sees_B1TT (bool): which places each place attends to."""
    branch_BT, limits_BRR = numbered(branches, width, device)
    rows = torch.arange(len(branches), device=device)[:, None, None]
    limits_BTT = limits_BRR[rows, branch_BT[:, :, None], branch_BT[:, None, :]]
    sees_BTT = torch.arange(width, device=device) < limits_BTT
    return sees_BTT.tril()[:, None]


def block_mask(branches: Sequence[Sequence[Branch]], ids_BT: Tensor) -> Any:
    """Return FlexAttention's BlockMask of the same view."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = ids_BT.shape
    branch_BT, limits_BRR = numbered(branches, width, ids_BT.device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k < limits_BRR[b, branch_BT[b, q], branch_BT[b, k]])

    return create_block_mask(sees, rows, None, width, width, device=ids_BT.device)


class Chains:
    """The branches of one row, ready for `chain_attention`: their lengths, contexts and masks."""

    def __init__(self, branches: Sequence[Branch], device: torch.device) -> None:
        """Make the mask of each branch that sees a context; the others are plainly causal."""
        self.lengths = [branch.stop - branch.start for branch in branches]
        self.contexts = [branch.context for branch in branches]
        self.masks_QK = [
            _after_context(sum(ids for _, ids in context), length, device) if context else None
            for context, length in zip(self.contexts, self.lengths, strict=True)
        ]

    def seen(self, parts: Sequence[Tensor], branch: int) -> Tensor:
        """Return the keys or values [1, H, K, D] that a branch sees; `parts` has each branch's."""
        before = [parts[earlier][:, :, :ids] for earlier, ids in self.contexts[branch]]
        return torch.cat([*before, parts[branch]], dim=2) if before else parts[branch]


def _after_context(context: int, length: int, device: torch.device) -> Tensor:
    every = torch.ones(length, context + length, dtype=torch.bool, device=device)
    return every.tril(context)


def chain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    chains: Chains | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend branch by branch: no place is computed that isn't seen, save half of a branch's own.

    query, key, value: [B, H, T, D] -> [B, T, H, D]. Without `chains` it is causal attention. The
    signature is that of transformers' attention functions.
    """
    if unknown := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if chains is None:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return mixed.transpose(1, 2), None
    queries, keys, values = (x.split(chains.lengths, dim=2) for x in (query, key, value))
    parts = [
        F.scaled_dot_product_attention(
            queries[r],
            chains.seen(keys, r),
            chains.seen(values, r),
            attn_mask=mask_QK,
            is_causal=mask_QK is None,
            scale=scaling,
        )
        for r, mask_QK in enumerate(chains.masks_QK)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
