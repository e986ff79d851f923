"""ArmoRM (arXiv 2406.12845): 19 objectives, gated by the prompt, from a published checkpoint.

Its remote code can't be imported by current transformers; this is the same arithmetic without it.
rewards = W h_last; gate = softmax(MLP(h_prompt) / temperature) x logit_scale;
score = sum(gate x (rewards @ transform)). h_last: the prefix's last id. h_prompt: the first id of
the last end-of-turn + assistant header in the prefix, so that the gate has read the prompt only.
Axes: P scored prefixes, R = 2 positions (prompt, last), D hidden size, K objectives.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from pipeline.errors import DataError
from pipeline.rewards import checkpoints
from pipeline.rewards.backbone import Backbone
from pipeline.rewards.base import NO_ASSISTANT_HEADER, Settings
from pipeline.rewards.onepass import OnePass

HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
OBJECTIVES = [
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
]
"""The published checkpoint's objectives, in order (its model card)."""


class Gating(nn.Module):
    """The network that weighs the objectives by the prompt: Linear + ReLU, then softmax."""

    def __init__(self, sizes: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, hidden_PD: Tensor) -> Tensor:
        """Return the weight of each objective, gates_PK; they add up to logit_scale."""
        *inner, last = self.layers
        for layer in inner:
            hidden_PD = torch.relu(layer(hidden_PD))
        return torch.softmax(last(hidden_PD) / self.temperature, dim=-1) * self.logit_scale


class GatingHead(nn.Module):
    """The regression layer, the gating network and the transform, in float32.

    Dimensions come from the config under the published code's names, with its defaults.
    """

    def __init__(self, config: Any, header: Sequence[int]) -> None:
        super().__init__()
        count = getattr(config, "num_objectives", 19)
        inner = [getattr(config, "gating_hidden_dim", 1024)] * getattr(config, "gating_n_hidden", 3)
        sizes = [config.hidden_size, *inner, count]
        self.objectives = objective_names(config, count)
        self.header = list(header)
        self.regression_layer = nn.Linear(config.hidden_size, count, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(count))
        self.gating = Gating(sizes, float(getattr(config, "gating_temperature", 10)))

    def places(self, ids: Sequence[int], length: int) -> list[int] | str:
        """Return [first id of the last assistant header, last id] of ids[:length]."""
        size = len(self.header)
        for start in range(length - size, -1, -1):
            if ids[start : start + size] == self.header:
                return [start, length - 1]
        return NO_ASSISTANT_HEADER

    def forward(self, hidden_PRD: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores_P and the objectives' raw rewards_PK."""
        rewards_PK = self.regression_layer(hidden_PRD[:, 1])
        gates_PK = self.gating(hidden_PRD[:, 0])
        return (gates_PK * (rewards_PK @ self.reward_transform_matrix)).sum(-1), rewards_PK


def objective_names(config: Any, count: int) -> list[str]:
    """Return what a checkpoint calls its objectives: its config's names, or the published ones.

    Names are the config's `objectives`, or its `id2label` where somebody has filled that in.
    """
    labels = getattr(config, "id2label", None) or {}
    labelled = [labels.get(k, "") for k in range(count)]
    told = getattr(config, "objectives", None) or (
        labelled if not any(name in ("", f"LABEL_{k}") for k, name in enumerate(labelled)) else None
    )
    if told is None:
        return OBJECTIVES if count == len(OBJECTIVES) else [f"objective_{k}" for k in range(count)]
    if len(set(told)) != count or not all(isinstance(name, str) for name in told):
        raise DataError(f"config.json names {len(told)} objectives for {count}, or one twice")
    return list(told)


class _Backbone(LlamaModel):
    # The head is loaded apart, in float32, and every name has been checked before.
    _keys_to_ignore_on_load_unexpected = (
        r"^regression_layer\.",
        r"^reward_transform_matrix$",
        r"^gating\.",
    )


def load(folder: Path, name: str, fingerprint: str, settings: Settings) -> OnePass:
    """Load a checkpoint in the published layout. Raises DataError on a tensor too many or few."""
    if settings.bos != "template":
        raise DataError(f"{name}: ArmoRM was trained with its template's BOS; leave --bos template")
    config = LlamaConfig.from_pretrained(folder)
    tokenizer = checkpoints.load_tokenizer(folder)
    head = GatingHead(config, _header(tokenizer, folder))
    _check(folder, config, head)
    head.load_state_dict(checkpoints.read_tensors(folder, head.state_dict().keys()))
    device, dtype = checkpoints.placement(config, settings)
    model = _Backbone.from_pretrained(
        folder, config=config, dtype=dtype, device_map=device, use_safetensors=True
    ).eval()
    scorer = OnePass(
        name,
        fingerprint,
        checkpoints.make_encoder(tokenizer, settings),
        Backbone(model, device),
        head.to(device),
        checkpoints.resolved(config, settings, device),
        checkpoints.PARALLEL[checkpoints.kind_of(device)],
    )
    scorer.probe(checkpoints.TOLERANCE[dtype])
    return scorer


def _header(tokenizer: Any, folder: Path) -> list[int]:
    ids = tokenizer.encode(HEADER, add_special_tokens=False)
    if ids[0] != tokenizer.convert_tokens_to_ids("<|eot_id|>"):
        raise DataError(f"the tokenizer in {folder} isn't Llama 3's: it has no <|eot_id|>")
    return ids


def _check(folder: Path, config: Any, head: GatingHead) -> None:
    with torch.device("meta"):
        backbone = LlamaModel(config).state_dict()
    expected = {f"model.{name}": list(tensor.shape) for name, tensor in backbone.items()}
    expected |= {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    checkpoints.check_tensors(folder, expected, checkpoints.tensor_shapes(folder))
