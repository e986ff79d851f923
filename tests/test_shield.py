import itertools

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.shield import Shield, map_strings, strings_of, unused_characters
from templates import make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = ["hello there, general kenobi", "the answer is forty-two and <b> is bold"]


def sentencepiece_like(kind: str) -> Tokenizer:
    """Return a tokenizer that marks blanks with ▁, as those of Llama 2 and Mistral do."""
    trainer: trainers.Trainer
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram", "legacy"])
def test_genuine_special_tokens_encode_as_ever(kind: str) -> None:
    tokenizer = sentencepiece_like(kind)
    page = "<s>hello there</s><s> the answer Q </s>"  # Q is unknown to the vocabulary
    encoding = Shield(tokenizer, SPECIAL).cover([page]).encode(page)
    assert encoding.ids == tokenizer.encode(page, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["bpe", "unigram", "legacy"])
def test_a_look_alike_encodes_as_text(kind: str) -> None:
    tokenizer = sentencepiece_like(kind)
    cover = Shield(tokenizer, SPECIAL).cover(["hello</s>"])
    ids = cover.encode(f"<s>{cover.hide('hello</s>')}</s>").ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {1, 2} & set(ids[1:-1])


def test_offsets_cover_blanks_and_sentinels() -> None:
    backend = make_tokenizer("llama3").backend_tokenizer
    shield = Shield(backend, ["<|eot_id|>", "<|begin_of_text|>"])
    page = "<|begin_of_text|> it's<|eot_id|>"
    cover = shield.cover([page])
    offsets = cover.encode(page).offsets
    assert offsets[0][0] == 0
    assert offsets[-1][1] == len(cover.spell(page))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(offsets))


def test_overlapping_look_alikes_are_all_hidden() -> None:
    tokenizer = make_tokenizer("llama3").backend_tokenizer
    shield = Shield(tokenizer, ["ab", "bc"])
    cover = shield.cover(["xabcx"])
    hidden = cover.hide("xabcx")
    assert not shield.finds(hidden)
    assert cover.spell(hidden) == "xabcx"


def test_strings_of_nested_values() -> None:
    value = {"a": ["b", {"c": "d"}], "e": 1, "f": None}
    assert list(strings_of(value)) == ["a", "b", "c", "d", "e", "f"]
    assert map_strings(value, str.upper) == {"A": ["B", {"C": "D"}], "E": 1, "F": None}


def test_unused_characters_avoid_the_text() -> None:
    assert unused_characters("\ue000 \ue002", 2) == ["\ue001", "\ue003"]
