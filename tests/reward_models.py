"""Tiny reward models in the published layouts, with random weights, for tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from pipeline.tiny import make_tokenizer

TEXTS = [
    "What is the sum of two and three? The sum is five. Thank you, and what is five times four?",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run a module's tiny models on one thread: two only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer_like_llama3(vocab_size: int = 384) -> Any:
    """Return a byte-level tokenizer with Llama-3's special tokens and chat template."""
    return make_tokenizer(TEXTS, vocab_size, max_context=4096)


def tiny_config(tokenizer: Any, **changes: Any) -> LlamaConfig:
    """Return the config of a two-layer Llama with grouped-query attention."""
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "dtype": "float32",
    }
    return LlamaConfig(**values | changes)


def write_armorm(
    folder: Path, tokenizer: Any = None, seed: int = 0, objectives: int = 19, **changes: Any
) -> Path:
    """Write a checkpoint in ArmoRM's published layout; return the folder."""
    tokenizer = tokenizer or tokenizer_like_llama3()
    config = tiny_config(tokenizer, **changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = _llama(LlamaModel, config, seed, "model.") | _head(config, objectives, generator)
    values = config.to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.Absent"},
        "num_objectives": objectives,
        "gating_temperature": 10,
        "gating_hidden_dim": 16,
        "gating_n_hidden": 3,
    }
    return _write(folder, tokenizer, values, tensors)


def write_classifier(folder: Path, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Path:
    """Write a LlamaForSequenceClassification with one label; return the folder."""
    tokenizer = tokenizer or tokenizer_like_llama3()
    config = tiny_config(tokenizer, num_labels=1, **changes)
    values = config.to_dict() | {"architectures": ["LlamaForSequenceClassification"]}
    tensors = _llama(LlamaForSequenceClassification, config, seed, "")
    return _write(folder, tokenizer, values, tensors)


def _llama(kind: Any, config: LlamaConfig, seed: int, prefix: str) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = kind(config).state_dict()
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _head(
    config: LlamaConfig, objectives: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    sizes = [config.hidden_size, 16, 16, 16, objectives]
    tensors = {
        "regression_layer.weight": draw(objectives, config.hidden_size, scale=0.2),
        "reward_transform_matrix": torch.eye(objectives) + draw(objectives, objectives, scale=0.1),
        "gating.logit_scale": torch.tensor([1.3]),
    }
    for i in range(4):
        # Wide enough that the gate is far from uniform at temperature 10.
        tensors[f"gating.layers.{i}.weight"] = draw(sizes[i + 1], sizes[i], scale=0.7)
        tensors[f"gating.layers.{i}.bias"] = draw(sizes[i + 1])
    return tensors


def _write(
    folder: Path, tokenizer: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # What transformers writes for one label; its `num_labels` is their length.
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
