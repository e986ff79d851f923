"""LoRA through peft: low-rank updates of frozen weights, merged into them when a model is saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.seeds import seed_for

ALL_LINEAR = "all-linear"
ADAPTER = "default"


def add_adapters(model: Any, rank: int, alpha: int, targets: str, run_seed: int) -> int:
    """Freeze a transformers model and adapt its linear layers in place; return how many.

    The model keeps its class: unlike peft's PeftModel, it is called and saved as before. Each
    update B A starts at 0, so the adapted policy is the base. No dropout, for the ratios of new to
    old log-probs would be noise. `targets`: `all-linear` (all but the head), or the last parts of
    their names, comma separated. Raises DataError where one of them names no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    dtype, names = model.dtype, [name.strip() for name in targets.split(",")]
    if targets != ALL_LINEAR:
        refuse_targets(model, names)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if targets == ALL_LINEAR else names,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "", 0, 0, "lora"))  # the same on every rank
        inject_adapter_in_model(settings, model, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # peft makes float32 of bf16; DeepSpeed wants one dtype, and has float32 masters.
            parameter.data = parameter.data.to(dtype)
    return len(adapted_layers(model))


def refuse_targets(model: Any, names: list[str]) -> None:
    """Raise DataError if a name is that of no linear layer, or that of the head.

    The head may share the embeddings' weight; merged, it couldn't.
    """
    from transformers.pytorch_utils import Conv1D

    linear = {k: m for k, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    known = [k for k, module in linear.items() if module is not model.get_output_embeddings()]
    unknown = [n for n in names if not any(f".{layer}".endswith(f".{n}") for layer in known)]
    if unknown:
        layers = sorted({layer.rpartition(".")[2] for layer in known})
        raise DataError(
            f"--lora_target_modules: {', '.join(map(repr, unknown))} can't have adapters; this "
            f"model's linear layers are {', '.join(layers)}"
        )


def adapted_layers(model: Any) -> dict[str, Any]:
    """Return the layers of a model that have an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def merged(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters of a model into its whole weights, under the names it has without them.

    W + alpha / r x B A (https://arxiv.org/abs/2106.09685), in float32. The model isn't touched:
    `weights` is its gathered state, and what is not adapted is handed on as it is.
    """
    state = dict(weights)
    for name, layer in adapted_layers(model).items():
        for kind in dict(layer.base_layer.named_parameters()):  # weight, and bias where it has one
            state[f"{name}.{kind}"] = state.pop(f"{name}.base_layer.{kind}")
        low_RI, high_OR = (state.pop(f"{name}.lora_{k}.{ADAPTER}.weight").float() for k in "AB")
        update_OI = layer.scaling[ADAPTER] * high_OR @ low_RI
        whole = state[f"{name}.weight"].float()
        state[f"{name}.weight"] = whole + (update_OI.T if layer.fan_in_fan_out else update_OI)
    return state
