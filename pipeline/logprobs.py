"""Log-probs of the trained ids: the only place in the house where logits become log-probs.

Axes: B rows, T places of a row, D hidden size, V vocabulary, U distinct predictions, C of them in a
chunk, N trained ids.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.attention import attention_inputs
from pipeline.errors import DataError
from pipeline.packing import Branch

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits in a chunk, at most: in float32 32 MB or 256 MB, and a few times that in flight.

On a CPU larger chunks are slower: each pass over them goes through memory, not the cache.
"""
KEPT_ELEMENTS = 2**26
"""Logits of a forward pass, at most, that are kept for its backward pass: 256 MB in float32."""


def chosen_logps(scaled_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the log-probs of the targets under softmax(scaled), scaled = logits / temperature."""
    return -F.cross_entropy(scaled_CV, targets_C, reduction="none")


def chunked_logps(
    hidden_UD: Tensor,
    targets_U: Tensor,
    chunk: int,
    kept: int,
    logps_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply `logps_of` to chunks of predictions and join the results.

    With more than `kept` predictions the chunks are recomputed in the backward pass, so that one of
    them at a time is in memory; it costs a quarter more than keeping their logits.
    """
    parts = zip(hidden_UD.split(chunk), targets_U.split(chunk), strict=True)
    if len(targets_U) <= kept:
        return torch.cat([logps_of(h, t) for h, t in parts])
    return torch.cat([checkpoint(logps_of, h, t, use_reentrant=False) for h, t in parts])


class MaskedLogprobs(nn.Module):
    """A causal language model that returns log-probs of the trained ids and no logits.

    Hand this module to `accelerator.prepare`: its forward calls the head as a submodule, so ZeRO-3
    and FSDP gather the head's weight where it is used.
    """

    def __init__(
        self, model: Any, temperature: float, chunk: int = 0, kept: int | None = None
    ) -> None:
        """Wrap `model`, a transformers `*ForCausalLM`.

        `chunk`: predictions at the head at once; 0 goes by the device. `kept`: how many a pass may
        have before its chunks are recomputed; None goes by the vocabulary.
        """
        super().__init__()
        self.model = model
        self.config = model.config  # accelerate sizes DeepSpeed's buckets by it
        self.temperature = temperature
        text_config = model.config.get_text_config()
        self.vocabulary = text_config.vocab_size
        self.chunk = chunk
        self.kept = KEPT_ELEMENTS // self.vocabulary if kept is None else kept
        self.shape_logits = _logit_shaper(text_config)

    def tie_weights(self) -> None:
        """Tie the head to the embeddings again: accelerate asks so when it has replaced weights."""
        self.model.tie_weights()

    def forward(
        self,
        ids_BT: Tensor,
        sources_U: Tensor,
        targets_U: Tensor,
        copies_N: Tensor | None = None,
        positions_BT: Tensor | None = None,
        branches: list[tuple[Branch, ...]] | None = None,
    ) -> Tensor:
        """Return logps_N, float32; without `copies_N` those of the U distinct predictions.

        `sources_U` indexes the flattened [B*T] places whose hidden state predicts `targets_U`.
        `branches` None is causal attention, exact for rows padded on the right.
        """
        seen = attention_inputs(branches, ids_BT, self.config._attn_implementation)
        output = self.model.base_model(
            input_ids=ids_BT, position_ids=positions_BT, use_cache=False, **seen
        )
        hidden_UD = output.last_hidden_state.flatten(0, 1)[sources_U]
        elements = CHUNK_ELEMENTS["cpu" if ids_BT.device.type == "cpu" else "cuda"]
        chunk = self.chunk or max(1, elements // self.vocabulary)
        logps_U = chunked_logps(hidden_UD, targets_U, chunk, self.kept, self._head_logps)
        return logps_U if copies_N is None else logps_U[copies_N]

    def _head_logps(self, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        logits_CV = self.shape_logits(self.model.get_output_embeddings()(hidden_CD)).float()
        if logits_CV.requires_grad:
            return chosen_logps(logits_CV / self.temperature, targets_C)
        # Nobody else has these logits: scaled where they are, they cost no second buffer.
        return chosen_logps(logits_CV.div_(self.temperature), targets_C)


def _logit_shaper(config: Any) -> Callable[[Tensor], Tensor]:
    """Return what some architectures do to their logits after the head (Gemma, Cohere, Granite)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0

    def shape(logits: Tensor) -> Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return shape


@torch.no_grad()
def check_head(policy: MaskedLogprobs) -> None:
    """Compare with the model's own logits on a few ids; raise DataError where they differ.

    An architecture may shape its logits in a way that we don't know of.
    """
    device = next(policy.parameters()).device
    ids_BT = torch.arange(8, device=device)[None] % policy.model.config.get_text_config().vocab_size
    sources_N = torch.arange(7, device=device)
    ours_N = policy(ids_BT, sources_N, ids_BT[0, 1:])
    logits_TV = policy.model(input_ids=ids_BT, use_cache=False).logits[0, :-1]
    theirs_N = chosen_logps(logits_TV.float() / policy.temperature, ids_BT[0, 1:])
    gap = (ours_N - theirs_N).abs().max().item()
    if not gap < (1e-3 if logits_TV.dtype == torch.float32 else 0.25):
        raise DataError(
            f"the log-probs of {type(policy.model).__name__} differ by {gap:.3g} from its own "
            "logits: this architecture does more to its logits than Turnwise knows of. "
            "Train another model, or teach `_logit_shaper` in pipeline/logprobs.py about it."
        )
