"""Tiny models with just enough behaviour for a real dialogue, and prompts for them.

Both models are Llamas that transformers and vLLM load like any other. The policy has random weights
and a push towards the end of its turn, so that some turns stop by themselves and some are cut. The
user is a Markov chain (attention and MLPs are zero) that says `Justification: because` and then
`Question: why?` or `how?` or `what?`.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.models import tiny_llama, write_folder
from pipeline.tiny import make_tokenizer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "ultrainteract_style_gsm8k.jsonl"
"""Real dialogues in UltraInteract's columns; the project ships no copy."""
SAYS = "Justification because\nQuestion: why? how what"
_WORDS = """a train leaves the station with so many apples how many are left after each stop if
every passenger eats two of them and buys three more what does it cost when the price doubles"""


def write_prompts(path: Path, count: int) -> str:
    """Write UltraInteract-style rows: real ones where they are, else made up; say which."""
    if GSM8K.exists():
        lines = list(itertools.islice(GSM8K.open(encoding="utf-8"), count))
        if len(lines) == count:
            path.write_text("".join(lines), encoding="utf-8")
            return f"{count} prompts of {GSM8K.name}"
    rows = (json.dumps(_made_up(number)) + "\n" for number in range(count))
    path.write_text("".join(rows), encoding="utf-8")
    return f"{count} made-up prompts"


def _made_up(number: int) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    words = draw.choice(_WORDS.split(), int(draw.integers(30, 90)))
    opening = {"from": "user", "value": f"{number}: {' '.join(words)}?"}
    return {"id": f"made-up-{number}", "task": "Math_CoT", "trajectory": [opening]}


def texts_of(prompts: Path) -> list[str]:
    """Return everything that is said in a file of prompts."""
    rows = map(json.loads, prompts.read_text(encoding="utf-8").splitlines())
    return [message["value"] for row in rows for message in row["trajectory"]]


def wired_tokenizer(texts: Iterable[str], max_context: int) -> Any:
    """Train a tokenizer; Llama-3's special tokens and dialogue format."""
    # Whole words for what the user says, as a large vocabulary would have them.
    return make_tokenizer([*texts, *[SAYS, "assistant\n\n"] * 2000], 1024, max_context)


def write_policy(folder: Path, tokenizer: Any) -> Path:
    """Write the policy; a turn ends by itself after about a dozen ids."""
    model = _llama(tokenizer, seed=1, hidden_size=64, layers=2, heads=2)
    with torch.no_grad():
        # A constant first channel survives the norms; the head reads the end of turn off it.
        model.model.embed_tokens.weight[:, 0] = 0.2
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 0.8
    write_folder(model, model.state_dict(), tokenizer, folder, torch.float32)
    return folder


def write_user(folder: Path, tokenizer: Any) -> Path:
    """Write the user model."""
    model = _llama(tokenizer, seed=2, hidden_size=256, layers=1, heads=4)
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


def _llama(tokenizer: Any, **sizes: int) -> Any:
    positions = tokenizer.model_max_length
    return tiny_llama(tokenizer, max_positions=positions, tie_embeddings=False, **sizes)


def _chain(tokenizer: Any) -> list[tuple[int, int]]:
    """Return which id follows which in what the user says."""

    def only(text: str) -> int:
        (number,) = tokenizer(text, add_special_tokens=False).input_ids
        return number

    start, colon, mark = only("\n\n"), only(":"), only("?")
    words = [only(" why"), only(" how"), only(" what")]
    lead = [start, only("Justification"), only(" because"), only("\n"), only("Question"), colon]
    chain = list(itertools.pairwise(lead))
    chain += [(colon, word) for word in words] + [(word, mark) for word in words]
    return [*chain, (mark, tokenizer.eos_token_id)]
