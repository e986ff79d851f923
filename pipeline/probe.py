"""Ask the model at hand whether rows with shared prefixes give what separate rows give."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.packing import Example, Strand, collate
from pipeline.records import Segment

TOLERANCE = {"fp32": 1e-3, "low": 0.25}
"""Largest difference of a log-prob, in nats: float32, and bf16, whose logits have 8 bits."""


def why_not_share(accelerator: Any, policy: Any) -> str | None:
    """Return the reason why prefixes can't be shared on this model, or None.

    `policy` is a prepared MaskedLogprobs. Every rank runs the same two passes.
    """
    config = accelerator.unwrap_model(policy).config
    text = config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} takes no mask of branches"
    # A short probe would never leave the window.
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "its attention has a sliding window"
    low = accelerator.mixed_precision != "no" or text.dtype not in (None, torch.float32)
    gap = largest_gap(accelerator, policy, probes(text.vocab_size))
    if not gap <= TOLERANCE["low" if low else "fp32"]:
        return f"log-probs differ by {gap:.3g} from those of separate rows"
    return None


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
        examples.append(Example("probe", strands, shared=fork))
    return examples


@torch.no_grad()
def largest_gap(accelerator: Any, policy: Any, examples: Sequence[Example]) -> float:
    """Return the largest difference between the log-probs of the two layouts."""
    policy.eval()
    apart = [replace(example, shared=0) for example in examples]
    together_N, apart_N = (
        policy(*collate(laid, accelerator.device).inputs) for laid in (examples, apart)
    )
    return float((together_N - apart_N).abs().max())
