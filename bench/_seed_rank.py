"""REFUEL's rank.py at its best: every prefix of every dialogue by itself, at batch size one.

Written anew from what that script and ArmoRM's published code compute, and apart from ours: equal
scores say that both are right. What it has in its favour: inference mode, SDPA, a fast tokenizer,
no cache kept, no pickles, no prints; the model is loaded once.
Axes: T ids of a prefix, D hidden size, K objectives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

MAX_LENGTH = 4096
GATE_AT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class SeedRank:
    """The model as the script has it: backbone and head in one dtype, on one device."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        """Load tokenizer, backbone and head."""
        from transformers import AutoTokenizer, LlamaModel

        self.device = device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.header = self.tokenizer.encode(GATE_AT, add_special_tokens=False)
        self.model = LlamaModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map=device, attn_implementation="sdpa"
        ).eval()
        self.temperature = float(self.model.config.gating_temperature)
        self.head = {
            name: tensor.to(device, getattr(torch, dtype))
            for name, tensor in head_tensors(folder).items()
        }

    def rank(self, messages: Sequence[Any], turns: int) -> list[float]:
        """Score the prefixes that end with each of the policy's turns."""
        return [self.score(messages[: 2 * i]) for i in range(1, turns + 1)]

    @torch.inference_mode()
    def score(self, messages: Sequence[Any]) -> float:
        """Read one prefix."""
        ids = self.tokenizer.apply_chat_template(
            list(messages), truncation=True, max_length=MAX_LENGTH, return_dict=False
        )
        ids_1T = torch.tensor([ids], device=self.device)
        hidden_TD = self.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        rewards_K = self.head["regression_layer.weight"] @ hidden_TD[-1]
        rewards_K = rewards_K @ self.head["reward_transform_matrix"]
        return float((self.gates(hidden_TD[last_at(ids, self.header)]) * rewards_K).sum())

    def gates(self, state_D: Tensor) -> Tensor:
        """Weigh the objectives by the prompt: gates_K."""
        layers = sum(name.startswith("gating.") and ".weight" in name for name in self.head)
        for i in range(layers):
            weight, bias = (self.head[f"gating.layers.{i}.{part}"] for part in ("weight", "bias"))
            state_D = F.linear(state_D, weight, bias)
            if i < layers - 1:
                state_D = F.relu(state_D)
        return F.softmax(state_D / self.temperature, dim=0) * self.head["gating.logit_scale"]


def head_tensors(folder: Path) -> dict[str, Tensor]:
    """Read what isn't the backbone's."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith("model.")]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    return found


def last_at(ids: Sequence[int], pattern: Sequence[int]) -> int:
    """Return where a pattern stands for the last time. Raises ValueError where it doesn't."""
    for start in reversed(range(len(ids) - len(pattern) + 1)):
        if list(ids[start : start + len(pattern)]) == list(pattern):
            return start
    raise ValueError("the prefix has no assistant header after an end of turn")
