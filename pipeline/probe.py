"""Ask the model at hand whether rows with shared prefixes give what separate rows give."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from pipeline.attention import CHAINS, chain_attention
from pipeline.microbatches import collate
from pipeline.packing import Example, Layout, Strand
from pipeline.records import Segment

TOLERANCE = {"fp32": 1e-3, "low": 0.25}
"""Largest difference of a log-prob, in nats: float32, and bf16, whose logits have 8 bits."""
AttentionInterface.register(CHAINS, chain_attention)
IMPLEMENTATION = {"chains": CHAINS, "flex": "flex_attention"}
"""The attention that a layout needs; a dense mask is for whatever the model was loaded with."""


def choose_layout(accelerator: Any, policy: Any, wanted: Sequence[Layout]) -> Layout:
    """Return the first wanted layout that this model computes exactly, else `apart`; say why.

    `policy` is a prepared MaskedLogprobs; its attention is set to what the layout needs. Every rank
    runs the same passes, and all take the same layout.
    """
    model = accelerator.unwrap_model(policy).model
    loaded = model.config._attn_implementation
    for layout in wanted:
        reason = _why_not(accelerator, policy, layout, loaded)
        refusals = torch.tensor([0.0 if reason is None else 1.0], device=accelerator.device)
        if not float(accelerator.reduce(refusals, reduction="sum")):
            return layout
        accelerator.print(f"no packing by {layout}: {reason or 'another rank refuses it'}")
        model.set_attn_implementation(loaded)
    return "apart"


def _why_not(accelerator: Any, policy: Any, layout: Layout, loaded: str) -> str | None:
    model = accelerator.unwrap_model(policy).model
    config = model.config.get_text_config()
    if reason := unpackable(config, loaded):
        return reason
    apart = probed(accelerator, policy, "apart")
    try:
        if layout in IMPLEMENTATION:
            model.set_attn_implementation(IMPLEMENTATION[layout])
        gap = float((probed(accelerator, policy, layout) - apart).abs().max())
    # Whatever a model or a compiler can't do with it: the layout is only a matter of speed.
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    low = accelerator.mixed_precision != "no" or config.dtype not in (None, torch.float32)
    if not gap <= TOLERANCE["low" if low else "fp32"]:
        return f"log-probs differ by {gap:.3g} from those of separate rows"
    return None


def unpackable(config: Any, attention: str) -> str | None:
    """Say why rows of branches aren't for a model: its text config, its attention; or None."""
    # A short probe would never leave the window.
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "the model's attention has a sliding window"
    if attention not in ("sdpa", "eager"):
        return f"{attention} takes no mask of branches"
    return None


@torch.no_grad()
def probed(accelerator: Any, policy: Any, layout: Layout) -> torch.Tensor:
    """Return the log-probs of the probe examples in a layout."""
    policy.eval()
    vocabulary = accelerator.unwrap_model(policy).config.get_text_config().vocab_size
    logps_N: torch.Tensor = policy(*collate(probes(vocabulary), layout, accelerator.device).inputs)
    return logps_N


def probes(vocabulary: int) -> list[Example]:
    """Return two examples whose members fork after 12 and after 5 ids."""
    rng = np.random.default_rng(0)
    examples = []
    for fork, tails in ((12, (4, 7)), (5, (3, 1))):
        prefix = rng.integers(0, vocabulary, fork)
        strands = {}
        for role, tail in zip(("chosen", "reject"), tails, strict=True):
            ids = np.concatenate([prefix, rng.integers(0, vocabulary, tail)]).astype(np.int32)
            mask = (np.arange(len(ids)) >= fork).astype(np.uint8)
            strands[role] = Strand(ids, mask, [Segment(0, len(ids), 0)])
        examples.append(Example("probe", strands))
    return examples
