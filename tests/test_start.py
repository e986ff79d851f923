"""What every trainer's flags refuse, all at once, before anything is loaded."""

import sys

import pytest

from pipeline import start
from pipeline.errors import DataError
from pipeline.start import TrainConfig
from tests import trainables

NAMED = {"base_model": "m", "output_dir": "o"}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def test_sound_flags_have_no_problem() -> None:
    assert TrainConfig(**NAMED).train_problems() == []
    assert (
        TrainConfig(**NAMED, lora_r=8, lora_target_modules="q_proj, v_proj").train_problems() == []
    )


def test_all_problems_are_told_at_once() -> None:
    config = TrainConfig(
        output_dir="o", warmup_ratio=1.0, lora_r=-1, lora_alpha=0, lora_target_modules="q_proj,"
    )

    assert config.train_problems() == [
        "--base_model is missing",
        "--warmup_ratio 1.0: at least 0 and less than 1",
        "--lora_r -1: at least 0",
        "--lora_alpha 0: at least 1",
        "--lora_target_modules 'q_proj,': a name is empty",
    ]


@pytest.mark.parametrize("mixed", ["fp16", "fp8"])
def test_a_launchers_precision_that_is_not_ours_is_refused_unless_a_flag_decides(
    mixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)

    assert TrainConfig(**NAMED).train_problems() == [
        f"accelerate's mixed_precision {mixed}: choose no or bf16, or give --dtype"
    ]
    assert TrainConfig(**NAMED, dtype="bf16").train_problems() == []


def test_flash_attention_in_float32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = TrainConfig(**NAMED, attn_implementation="flash_attention_2")

    assert flash.train_problems() == ["--attn_implementation flash_attention_2 needs --dtype bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert flash.train_problems() == []


def test_lora_without_peft_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == "peft" else sys)

    assert TrainConfig(**NAMED, lora_r=8).train_problems() == [
        "peft is missing. Install it with `pip install 'turnwise[lora]'`"
    ]
    assert TrainConfig(**NAMED).train_problems() == []


def test_a_quantised_base_is_refused() -> None:
    model = trainables.tiny_model()
    start.refuse_quantised(model, "the/base")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(DataError, match="'the/base' holds quantised weights, which can't be"):
        start.refuse_quantised(model, "the/base")
