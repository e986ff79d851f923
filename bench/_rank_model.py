"""Write an ArmoRM with random weights in the published layout, whatever its size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _workload import SHAPES as LLAMAS
from _workload import Shape
from safetensors.torch import save_file
from torch import Tensor

# The published ArmoRM's sizes are those of Llama-3-8B (its config.json); the others are
# bench/train.py's. 20m has 20.9M parameters here, half of them in the embeddings.
SHAPES = {
    "tiny": LLAMAS["tiny"],
    "20m": LLAMAS["20m"],
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
}
OBJECTIVES = 19
GATING_LAYERS = 3
TEMPERATURE = 10
SHARD_BYTES = 4 * 2**30


def write_armorm(folder: Path, shape: Shape, tokenizer: Any, device: str, dtype: str) -> int:
    """Write the checkpoint, drawn on the device, in shards; return its parameters."""
    config = llama_config(shape)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    values = config.to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_objectives": OBJECTIVES,
        "gating_temperature": TEMPERATURE,
        "gating_hidden_dim": gating_width(shape),
        "gating_n_hidden": GATING_LAYERS,
        "dtype": dtype,
        # What transformers writes for one label; its `num_labels` is their length.
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    (folder / "config.json").write_text(json.dumps(values))
    parameters = 0
    where: dict[str, str] = {}
    for number, shard in enumerate(_shards(shape, device, getattr(torch, dtype)), 1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
        parameters += sum(tensor.numel() for tensor in shard.values())
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def llama_config(shape: Shape) -> Any:
    """Return the backbone's config."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        pad_token_id=None,
    )


def gating_width(shape: Shape) -> int:
    """Return the published 1024, or less where the model is smaller."""
    return min(1024, shape.hidden)


def _shards(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Yield every tensor, in files of a few GB: memory holds one at a time."""
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    size = 0
    for name, sizes in _sizes(shape).items():
        shard[name] = _drawn(name, sizes, generator).to(dtype).cpu()
        size += shard[name].nbytes
        if size > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    from transformers import LlamaModel

    with torch.device("meta"):
        backbone = LlamaModel(llama_config(shape)).state_dict()
    sizes: dict[str, tuple[int, ...]] = {f"model.{k}": tuple(v.shape) for k, v in backbone.items()}
    sizes["regression_layer.weight"] = (OBJECTIVES, shape.hidden)
    sizes["reward_transform_matrix"] = (OBJECTIVES, OBJECTIVES)
    sizes["gating.logit_scale"] = (1,)
    widths = [shape.hidden, *[gating_width(shape)] * GATING_LAYERS, OBJECTIVES]
    for i in range(GATING_LAYERS + 1):
        sizes[f"gating.layers.{i}.weight"] = (widths[i + 1], widths[i])
        sizes[f"gating.layers.{i}.bias"] = (widths[i + 1],)
    return sizes


def _drawn(name: str, sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a tensor under which hidden states stay near 1 and the gate is far from even."""
    if name.endswith("norm.weight") or name == "gating.logit_scale":
        return torch.ones(sizes)
    drawn = torch.randn(sizes, generator=generator, device=generator.device)
    if name == "model.embed_tokens.weight":
        return 0.02 * drawn  # Llama's own start
    if name.endswith(".bias"):
        return 0.1 * drawn
    if name == "reward_transform_matrix":
        return torch.eye(OBJECTIVES, device=drawn.device) + 0.1 * drawn
    last = name == f"gating.layers.{GATING_LAYERS}.weight"
    return (TEMPERATURE if last else 1) * drawn / sizes[1] ** 0.5
