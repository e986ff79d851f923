"""Tiny models with just enough behaviour for a real dialogue: made by hand, not trained.

Both are Llamas that transformers and vLLM load like any other. `policy`: random weights, with a
push towards the end-of-turn token, so that some turns stop by themselves and some are cut.
`user`: a Markov chain (attention and MLPs are zero) that says `Justification: because` and then
`Question: why?` or `how?` or `what?`.
"""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from pipeline.models import tiny_llama, write_folder
from pipeline.tiny import make_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
GSM8K = DATA / "ultrainteract_style_gsm8k.jsonl"
HH = DATA / "hh_rlhf_harmless_test_600.jsonl.gz"
CONTEXT = 3072
SAYS = "Justification because\nQuestion: why? how what"


def real_rows(count: int) -> tuple[list[dict], list[dict]]:
    """Return the first rows of both real inputs."""
    with GSM8K.open(encoding="utf-8") as file:
        math = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        chats = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    return math, chats


def tokenizer() -> Any:
    """Train a tokenizer on the real rows; Llama-3's special tokens and dialogue format."""
    math, chats = real_rows(200)
    texts = [message["value"] for row in math for message in row["trajectory"]]
    texts += [row["chosen"] for row in chats]
    # Whole words for what the user says, as a large vocabulary would have them.
    return make_tokenizer([*texts, *[SAYS, "assistant\n\n"] * 2000], 1024, CONTEXT)


def write_policy(folder: Path, tokenizer: Any) -> Path:
    """Write the policy; a turn ends by itself after about a dozen ids."""
    model = tiny_llama(
        tokenizer,
        seed=1,
        hidden_size=64,
        layers=2,
        heads=2,
        max_positions=CONTEXT,
        tie_embeddings=False,
    )
    with torch.no_grad():
        # A constant first channel survives the norms; the head reads the end of turn off it.
        model.model.embed_tokens.weight[:, 0] = 0.2
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 0.8
    write_folder(model, model.state_dict(), tokenizer, folder, torch.float32)
    return folder


def write_user(folder: Path, tokenizer: Any) -> Path:
    """Write the user model."""
    model = tiny_llama(
        tokenizer,
        seed=2,
        hidden_size=256,
        layers=1,
        heads=4,
        max_positions=CONTEXT,
        tie_embeddings=False,
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = model.model.embed_tokens.weight
        states /= states.norm(dim=1, keepdim=True)
        head = model.lm_head.weight
        head.zero_()
        for before, after in _chain(tokenizer):
            # The norm scales a state of length 1 by sqrt(hidden size) = 16: a lead of 24 nats.
            head[after] += 1.5 * states[before]
    write_folder(model, model.state_dict(), tokenizer, folder, torch.float32)
    return folder


def _chain(tokenizer: Any) -> list[tuple[int, int]]:
    def only(text: str) -> int:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == 1, (text, tokenizer.convert_ids_to_tokens(ids))
        return ids[0]

    start, colon, mark = only("\n\n"), only(":"), only("?")
    words = [only(" why"), only(" how"), only(" what")]
    lead = [start, only("Justification"), only(" because"), only("\n"), only("Question"), colon]
    chain = list(itertools.pairwise(lead))
    chain += [(colon, word) for word in words] + [(word, mark) for word in words]
    return [*chain, (mark, tokenizer.eos_token_id)]
