"""Whole dialogues, encoded by the fast way, are what the slow way makes of them, row by row."""

import json
import random
from typing import Any

import pytest

from page_oracle import encoded_slowly
from pipeline.chat import Chat
from pipeline.errors import RowError
from templates import FORMATS, PUBLISHED, make_tokenizer

DATE = "2024-12-24"
TOOLS = json.dumps([{"type": "function", "function": {"name": "guess", "description": 'A "g".'}}])
PLAIN = ["Hi.", "Is it higher?", "the answer", "I guess 16.", "forty-two", "Hello there.", "user"]
HOSTILE = [
    *("", " ", "\n", "\n\nHello.", " padded ", "trailing\n", "\n\n\n", "\ttab"),
    *("<|eot_id|>", "x<|im_end|>\n<|im_start|>assistant\ny", "</s>", "[INST] a [/INST]", "<eos>"),
    *("assistant\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "assistant: no"),
    *("<think>\nHm.\n</think>\n\nFine.", "</think>", "<think>", "a</think>b", "<|im_", "end|>"),
    *("\ue000", '\ue000"', "\ue001 0\ue002", "\x00", "a\x00b", "Grüße 🙂", "e\u0301", "\u0301"),
    *("日本語", "\u200b", "\u00a0x\u00a0", "\u2028x", "\r\n", "{{ messages }}", "<tool_response>x"),
    *('"quoted" \\ \n', "{% endif %}", "er", "r\n", "16", "long " * 3000, "(short) no"),
]
ALL = [*((name, False) for name in FORMATS), *((name, True) for name in PUBLISHED)]


def a_text(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.7:
        return " ".join(draw.choices(PLAIN, k=draw.randint(1, 8)))
    return draw.choice(HOSTILE) if kind < 0.9 else "".join(draw.choices(HOSTILE[:-2], k=3))


def a_message(draw: random.Random, role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": a_text(draw)}
    if role == "assistant" and draw.random() < 0.05:
        message["reasoning_content"] = a_text(draw)
    if role == "assistant" and draw.random() < 0.05:
        arguments = draw.choice(['{"n": 16}', '{"t": "<|im_end|>"}', "not JSON"])
        message["tool_calls"] = [{"id": "1", "name": "guess", "arguments": arguments}]
    return message


def a_dialogue(draw: random.Random) -> tuple[list[dict[str, Any]], str | None]:
    roles = ["system"] * (draw.random() < 0.3)
    for _ in range(draw.randint(1, 4)):
        roles += ["user", "assistant"]
        roles += ["tool", "assistant"] * (draw.random() < 0.1)
    if draw.random() < 0.1:
        draw.shuffle(roles)
    messages = [a_message(draw, role) for role in roles]
    if draw.random() < 0.1:
        messages += messages
    return messages, TOOLS if draw.random() < 0.1 else None


def fast(chat: Chat, dialogues: list[Any]) -> list[Any]:
    return [
        found.reason if isinstance(found, RowError) else found
        for found in chat.encode_dialogues(dialogues)
    ]


@pytest.mark.parametrize(("name", "published"), ALL)
def test_the_fast_way_equals_the_slow_one(name: str, published: bool) -> None:
    chat = Chat(make_tokenizer(name, published), DATE)
    draw = random.Random(f"{name} {published}")
    dialogues = [a_dialogue(draw) for _ in range(300)]
    slow = [encoded_slowly(chat, *dialogue) for dialogue in dialogues]
    assert fast(chat, dialogues) == slow
    order = draw.sample(range(300), 300)
    assert fast(chat, [dialogues[i] for i in order]) == [slow[i] for i in order]
    assert [fast(chat, [dialogue])[0] for dialogue in dialogues[:40]] == slow[:40]
