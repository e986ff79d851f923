"""Tiny models with just enough behaviour for a real dialogue (bench/_wired.py), and real inputs."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from _wired import GSM8K, wired_tokenizer, write_policy, write_user

__all__ = ["CONTEXT", "GSM8K", "HH", "real_rows", "tokenizer", "write_policy", "write_user"]

HH = GSM8K.with_name("hh_rlhf_harmless_test_600.jsonl.gz")
CONTEXT = 3072


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
    return wired_tokenizer([*texts, *(row["chosen"] for row in chats)], CONTEXT)
