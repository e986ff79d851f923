"""Texts that begin alike have the ids that the tokenizer gives for each of them whole."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from page_oracle import encoded_slowly
from pipeline.chat import Chat
from pipeline.page_ids import token_widths
from pipeline.shared_starts import LEAST, SharedStarts
from templates import FORMATS, PUBLISHED, make_tokenizer

WORDS = [
    "the",
    "answer",
    "is",
    "higher",
    "er",
    "Grüße",
    "🙂",
    "日本",
    "\n\n",
    " the",
    "16",
    "e\u0301",
]


def trained(added: list[AddedToken], normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.normalizer = normalizer
    tokenizer.add_tokens(added)
    return tokenizer


def plain(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def starts_of(tokenizer: Tokenizer, keeps: Any = lambda text: True) -> SharedStarts:
    widths = token_widths(tokenizer)
    assert widths is not None
    return SharedStarts(tokenizer, widths, keeps)


def family(draw: random.Random, borders: list[str]) -> list[str]:
    """Return texts that part anywhere, within words and within borders."""
    pieces = [" ".join(draw.choices(WORDS, k=12)) + draw.choice(borders) for _ in range(12)]
    trunk = "".join(pieces)
    texts = [trunk]
    for _ in range(draw.randint(1, 3)):
        end = draw.randint(1, len(trunk))
        texts.append(trunk[:end] + draw.choice(["", *borders, *WORDS]) + draw.choice(borders) + "x")
    return texts


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "borders",
    [
        ["<|end|>"],
        ["<a>", "<a>b", "b<c>"],  # one that another begins with: where a text parts decides
        ["<\uff5cend\uff5c>"],
        ["\u0120the", "<|end|>"],  # spelled as the model spells " the"
        ["er"],
    ],
)
def test_ids_are_those_of_whole_texts(borders: list[str], special: bool) -> None:
    tokens = [AddedToken(border, special=special, normalized=False) for border in borders]
    tokenizer = trained(tokens)
    draw = random.Random(str(borders))
    texts = [text for _ in range(150) for text in family(draw, borders)]
    assert starts_of(tokenizer).encode(texts) == plain(tokenizer, texts)
    assert starts_of(tokenizer).encode([]) == []


def test_normalized_tokens_and_texts_that_a_normalizer_changes() -> None:
    tokens = [AddedToken("<a>", normalized=False), AddedToken("<b>", normalized=True)]
    tokenizer = trained(tokens, normalizers.NFC())
    draw = random.Random(0)
    texts = [text for _ in range(150) for text in family(draw, ["<a>", "<b>"])]
    normalizer = tokenizer.normalizer
    starts = starts_of(tokenizer, lambda text: normalizer.normalize_str(text) == text)
    assert any(normalizer.normalize_str(text) != text for text in texts)
    assert starts.encode(texts) == plain(tokenizer, texts)


PAD = "the answer is higher " * (LEAST // 16)


def test_a_longer_added_token_may_begin_where_texts_part() -> None:
    tokenizer = trained([AddedToken(token, normalized=False) for token in ("<a>", "<a>bcd")])
    texts = [f"{PAD}<a>x", f"{PAD}<a>bcd", f"{PAD}<a>bc"]
    assert starts_of(tokenizer).encode(texts) == plain(tokenizer, texts)


def test_bytes_that_a_normalizer_adds_and_takes_elsewhere() -> None:
    # Three bytes become six, and three times three become two: as many as there were.
    tokenizer = trained([AddedToken("<a>", normalized=False)], normalizers.NFC())
    start = f"{PAD}\u0958<a>tttttt"
    texts = [start + "e\u0301" * 3, start + "z"]
    keeps = [tokenizer.normalizer.normalize_str(text) == text for text in texts]
    assert keeps == [False, False]
    starts = starts_of(tokenizer, lambda text: keeps[texts.index(text)])
    assert starts.encode(texts) == plain(tokenizer, texts)


def test_the_model_may_give_the_id_of_an_added_token() -> None:
    # Spelled as the model's vocabulary spells " the".
    tokenizer = trained([AddedToken("\u0120the", normalized=False)])
    assert tokenizer.token_to_id("\u0120the") in tokenizer.encode("x the").ids
    texts = [f"{PAD} the {PAD}x", f"{PAD} the {PAD}y"]
    assert starts_of(tokenizer).encode(texts) == plain(tokenizer, texts)


def test_what_is_shared_is_encoded_once() -> None:
    tokenizer = trained([AddedToken("<|end|>", special=True)])
    seen = list[str]()

    class Counting:
        def get_added_tokens_decoder(self) -> Any:
            return tokenizer.get_added_tokens_decoder()

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return tokenizer.encode_batch_fast(texts, **options)

    widths = token_widths(tokenizer)
    shared = "the answer is higher <|end|>" * 20
    texts = [shared + "16", shared + "17<|end|>", shared + "18", "other " + shared]
    starts = SharedStarts(Counting(), widths, lambda text: True)  # type: ignore[arg-type]
    assert starts.encode(texts) == plain(tokenizer, texts)
    # A border and the longest added token before the place where they part.
    assert seen == [
        texts[0],
        texts[3],
        *(shared[-28:] + text[len(shared) :] for text in texts[1:3]),
    ]
    assert starts.encode(["a" * LEAST, "a" * LEAST]) == plain(tokenizer, ["a" * LEAST] * 2)


@pytest.mark.parametrize(
    ("name", "published"), [(n, False) for n in FORMATS] + [(n, True) for n in PUBLISHED]
)
def test_pairs_and_groups_of_every_template(name: str, published: bool) -> None:
    chat = Chat(make_tokenizer(name, published), "2024-12-24")
    draw = random.Random(name)
    dialogues: list[Any] = []
    for _ in range(40):
        said = [
            {"role": role, "content": " ".join(draw.choices(WORDS, k=9)).strip()}
            for _ in range(5)
            for role in ("user", "assistant")
        ]
        fork = 2 * draw.randrange(5) + 1
        for k in range(draw.randint(2, 4)):
            ends = [*said[:fork], {"role": "assistant", "content": f"{k} {draw.choice(WORDS)}"}]
            dialogues.append((ends if k % 2 else ends + said[fork + 1 :], None))
    found = [getattr(entry, "reason", entry) for entry in chat.encode_dialogues(dialogues)]
    assert found == [encoded_slowly(chat, *dialogue) for dialogue in dialogues]
