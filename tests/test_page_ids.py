"""Whole dialogues, encoded by the fast way, are what the slow way makes of them, row by row."""

import json
import random
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from page_oracle import encoded_slowly
from pipeline.chat import AT_ONCE, Chat
from pipeline.errors import RowError
from pipeline.page_ids import token_widths
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


def backend_of(kind: str) -> Tokenizer:
    """Return a tokenizer of a kind that models have, trained on a few lines."""
    special = ["<unk>", *FORMATS["chatml"][1]]
    text = [*PLAIN, "Grüße, e\u0301t e\u0301, \u00e9!", "quoted words, and: long ones 1616"] * 3
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    if kind in ("metaspace", "legacy"):
        tokenizer.decoder = decoders.Metaspace()
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
        digits = pre_tokenizers.Split(Regex(r"\p{N}|\p{L}+|\s+"), "merged_with_next")
        steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    if kind == "lowercase":
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(text, trainer)
    if kind == "strips":
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", lstrip=True, special=True)])
    if kind == "alphabet":
        tokenizer.model = models.BPE({"<unk>": 0, "a": 1, "b": 2}, [], unk_token="<unk>")
    return tokenizer


BYTES = {"bytes": True, "nfc": True, "prefix": False, "lowercase": False, "strips": False}
KINDS = BYTES | {"metaspace": False, "legacy": False}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_what_its_offsets_say(kind: str) -> None:
    backend = backend_of(kind)
    assert (token_widths(backend) is not None) is KINDS[kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=FORMATS["chatml"][0]
    )
    chat, draw = Chat(tokenizer, DATE), random.Random(kind)
    dialogues = [a_dialogue(draw) for _ in range(200)]
    slow = [encoded_slowly(chat, *dialogue) for dialogue in dialogues]
    assert fast(chat, dialogues) == slow
    assert sum(not isinstance(answer, str) for answer in slow) > 20


def test_the_widths_of_tokens_are_their_bytes() -> None:
    backend = backend_of("bytes")
    backend.add_tokens(["<thought é>"])
    widths = token_widths(backend)
    assert widths is not None
    text = "Grüße, 16 long 日本語\n <|im_end|><thought é>"
    ids = backend.encode(text, add_special_tokens=False).ids
    assert [widths[id_] for id_ in ids[-2:]] == [10, 12]
    assert sum(widths[id_] for id_ in ids) == len(text.encode())
    assert max(widths[id_] for id_ in ids[:-2]) > 1


def test_widths_that_vary_are_none() -> None:
    assert token_widths(backend_of("alphabet")) is None
    backend = backend_of("bytes")
    for name, value in [("dropout", 0.1), ("end_of_word_suffix", "</w>")]:
        setattr(backend.model, name, value)
        assert token_widths(backend) is None, name
        setattr(backend.model, name, None)
    assert token_widths(backend) is not None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert token_widths(backend) is None
    backend.pre_tokenizer = None
    assert token_widths(backend) is None
    unnamed = backend_of("nfc")
    unnamed.add_special_tokens([AddedToken("<e\u0301>", special=True)])
    assert token_widths(unnamed) is None
    assert token_widths(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


def test_what_the_normalizer_changes_is_not_counted_in_bytes() -> None:
    """NFC makes é of e and its accent: three bytes are two, and turns stand elsewhere."""
    backend = backend_of("nfc")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=FORMATS["chatml"][0]
    )
    chat = Chat(tokenizer, DATE)
    said = [{"role": "user", "content": "e\u0301"}, {"role": "assistant", "content": "So."}]
    ids, ((start, end),) = chat.encode_dialogue(said)
    assert chat.decode(ids[start:end]) == "So."
    assert (ids, [(start, end)]) == encoded_slowly(chat, said, None)
    # Here it takes away as many bytes as it adds: the sum is right, and the places aren't.
    said = [
        {"role": "user", "content": "\u0958"},
        {"role": "assistant", "content": "e\u0301e\u0301e\u0301"},
    ]
    assert chat.encode_dialogue(said) == encoded_slowly(chat, said, None)


def test_settings_of_the_tokenizer_change_nothing() -> None:
    chat = Chat(make_tokenizer("llama3"), DATE)
    said = [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Hello."}]
    found = chat.encode_dialogue(said)
    backend = chat.tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    assert chat.encode_dialogue(said) == found
    backend.no_truncation()
    backend.enable_padding(length=500)
    assert chat.encode_dialogue(said) == found
    backend.no_padding()
    backend.encode_special_tokens = True
    assert chat.encode_dialogue(said) == found


def test_more_dialogues_than_are_encoded_at_once() -> None:
    chat = Chat(make_tokenizer("gemma"), DATE)
    good = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    bad = [{"role": "system", "content": "No."}, *good]
    typed = [{"role": "user", "content": "<end_of_turn>"}, good[1]]
    dialogues = [((good, bad, typed)[i % 3], None) for i in range(2 * AT_ONCE + 3)]
    found = fast(chat, dialogues)
    assert found[:3] == [encoded_slowly(chat, *dialogue) for dialogue in dialogues[:3]]
    assert found[1] == "template_error"
    assert found == [found[i % 3] for i in range(len(dialogues))]
