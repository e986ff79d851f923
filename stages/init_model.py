"""Make a small random policy with a tokenizer of its own, to try a pipeline without a download.

python stages/init_model.py --dataset guessing_game --output_dir ./tiny
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.config import execution, run
from pipeline.errors import DataError


@dataclass(frozen=True)
class Config:
    """Make a Llama with random weights and a byte-level tokenizer trained on a dataset's text."""

    output_dir: str = execution("")
    """Where to write the model folder."""
    dataset: str = "guessing_game"
    """What the tokenizer learns from: a JSONL file, a dataset repo, or guessing_game[:HIGHEST]."""
    dataset_split: str = "train"
    """Split of the dataset."""
    num_data: int = 0
    """How many prompts of it to read; 0 reads all."""
    vocab_size: int = 512
    """Most ids of the tokenizer, its 5 special tokens and 256 bytes included."""
    hidden_size: int = 96
    """Width of the model."""
    num_layers: int = 3
    """Decoder layers."""
    num_heads: int = 3
    """Attention heads; vLLM on a CPU takes heads of 32 channels or more."""
    max_context: int = 512
    """Longest context in ids."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        problems = [] if self.output_dir else ["--output_dir is missing"]
        if self.vocab_size < 261:
            problems.append(f"--vocab_size {self.vocab_size}: at least 261 (256 bytes, 5 special)")
        if self.hidden_size % (2 * self.num_heads):
            problems.append(
                f"--hidden_size {self.hidden_size} is no multiple of twice --num_heads"
                f" {self.num_heads} (rotary embeddings need an even head size)"
            )
        if problems:
            raise DataError("; ".join(problems))


def main(config: Config) -> None:
    """Train the tokenizer, draw the weights, save the folder."""
    from pipeline.prompts import source_of

    output = store.begin_model(
        "init_model", config, config.output_dir, inputs=source_of(config.dataset), seed=config.seed
    )
    if output.finished:
        return
    import torch

    from pipeline.models import tiny_llama, untied, write_folder
    from pipeline.tiny import make_tokenizer

    tokenizer = make_tokenizer(_texts(config), config.vocab_size, config.max_context)
    model = tiny_llama(
        tokenizer,
        hidden_size=config.hidden_size,
        layers=config.num_layers,
        heads=config.num_heads,
        max_positions=config.max_context,
        seed=config.seed,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {len(tokenizer)} ids")

    weights = untied(model, model.state_dict())

    def save(folder: Path) -> None:
        write_folder(model, weights, tokenizer, folder, torch.float32)

    output.finish(save, counts={"parameters": parameters, "vocabulary": len(tokenizer)})


def _texts(config: Config) -> Iterator[str]:
    from pipeline.environments.guessing_game import corpus
    from pipeline.prompts import load_prompts

    if config.dataset.startswith("guessing_game"):
        yield from corpus()
        return
    prompts = load_prompts(
        config.dataset, config.dataset_split, config.num_data, config.seed, keep_user_turns=True
    )
    for prompt in prompts:
        yield from (message.get("content") or "" for message in prompt.messages)
        yield from prompt.info.get("user_turns", [])


if __name__ == "__main__":
    run(main, Config)
