"""What bench/train.py trains on: shapes of models, pairs of realistic lengths, a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.packing import Example, Strand
from pipeline.records import Segment

PAD, EOS, FIRST_WORD = 0, 1, 2
SPECIAL = {PAD: "<pad>", EOS: "<eos>"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama by its sizes, with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Weights of the head, which are those of the embeddings too."""
        return self.hidden * self.vocabulary


# meta-llama/Llama-3.2-1B and -3B tie their embeddings (config.json of either), and so does the
# small one: 20.4M parameters, half of them in the embeddings.
SHAPES = {
    "tiny": Shape(32, 2, 2, 2, 16, 64, 500),
    "20m": Shape(320, 8, 5, 5, 64, 896, 32000),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256),
}


@dataclass(frozen=True)
class Lengths:
    """Ranges of a pair's lengths in ids, both ends included, and the seed's row, in ids."""

    prefix: tuple[int, int] = (100, 1200)
    response: tuple[int, int] = (50, 600)
    row: int = 2048


def write_model(folder: Path, shape: Shape) -> None:
    """Write a Llama with seeded random weights, and a tokenizer whose words are w2, w3, ..."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(shape.vocabulary).save_pretrained(folder)


def make_tokenizer(vocabulary: int) -> Any:
    """Make a tokenizer that reads `w5 w17` as ids 5 and 17: any ids survive a trip through text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {text_of([i]): i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def text_of(ids: Sequence[int]) -> str:
    """Write ids as the words that the tokenizer reads."""
    return " ".join(SPECIAL.get(i, f"w{i}") for i in ids)


def make_pairs(count: int, vocabulary: int, lengths: Lengths, seed: int) -> list[Example]:
    """Draw pairs: a shared prefix, then two responses that end in <eos> and train."""
    rng = np.random.default_rng(seed)

    def drawn(least: int, most: int) -> npt.NDArray[np.int32]:
        return rng.integers(FIRST_WORD, vocabulary, rng.integers(least, most + 1), dtype=np.int32)

    def strand(prefix: npt.NDArray[np.int32], reward: float) -> Strand:
        response = drawn(*lengths.response)
        response[-1] = EOS
        ids = np.concatenate([prefix, response])
        mask = (np.arange(len(ids)) >= len(prefix)).astype(np.uint8)
        return Strand(ids, mask, [Segment(0, len(ids), 0)], reward)

    pairs = []
    for i in range(count):
        prefix = drawn(*lengths.prefix)
        sides = {"chosen": strand(prefix, rng.random()), "reject": strand(prefix, -rng.random())}
        pairs.append(Example(f"pair-{i:02d}", sides))
    return pairs


def counts(pair: Example) -> tuple[int, list[int]]:
    """Return the ids of the prefix and of each response."""
    responses = [int(strand.mask.sum()) for strand in pair.strands.values()]
    return len(pair.strands["chosen"].ids) - responses[0], responses


def places(pair: Example) -> int:
    """Return the distinct ids of a pair: the prefix once, and both responses."""
    prefix, responses = counts(pair)
    return prefix + sum(responses)


def needed_flops(shape: Shape, pair: Example) -> float:
    """Return what training on a pair takes at the least, forward and backward.

    `3 (2 P_layers ids + 2 P_head trained + 4 layers heads head_dim attended)`: the prefix is read
    once, the head runs where an id trains, and an id attends to itself and what it follows.
    """
    prefix, responses = counts(pair)
    attended = prefix * (prefix + 1) / 2
    attended += sum(r * prefix + r * (r + 1) / 2 for r in responses)
    matrices = 2 * shape.layer_parameters * places(pair)
    head = 2 * shape.head_parameters * sum(responses)
    return 3 * (matrices + head + 4 * shape.layers * shape.heads * shape.head_dim * attended)
