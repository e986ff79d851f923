"""A run goes on under the strategy and the processes that were asked for, or not at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.errors import DataError
from pipeline.strategy import (
    configure_deepspeed,
    decoder_layers,
    deepspeed_problems,
    fsdp_plugin,
    launch_problems,
    name_of,
    refuse_other_strategy,
    refuse_unsharded,
    start,
)
from tests import trainables


def state(kind: str, processes: int, stage: int | None = None) -> Any:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=processes,
        deepspeed_plugin=plugin,
        fsdp_plugin=SimpleNamespace(fsdp_version=2),
    )


@pytest.mark.parametrize(
    ("active", "asked", "environ", "complaint"),
    [
        (state("NO", 1), 2, {}, "--num_processes is 2, 1 process"),
        (state("NO", 1), 0, {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, 1 process"),
        (state("MULTI_CPU", 2), 0, {"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for"),
        (state("NO", 1), 0, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED was asked for"),
    ],
)
def test_another_strategy_or_world_size_is_refused(
    active: Any, asked: int, environ: dict[str, str], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        refuse_other_strategy(active, asked, environ)


def test_what_was_asked_for_goes_on() -> None:
    refuse_other_strategy(state("NO", 1), 0, {})
    refuse_other_strategy(state("MULTI_CPU", 2), 2, {"WORLD_SIZE": "2"})
    zero = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    refuse_other_strategy(state("DEEPSPEED", 2, 3), 2, zero)
    sharded = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}
    refuse_other_strategy(state("FSDP", 2), 2, sharded)


def test_the_strategy_is_named_with_its_stage_or_version() -> None:
    assert name_of(state("DEEPSPEED", 2, 3)) == "DEEPSPEED ZeRO-3"
    assert name_of(state("MULTI_GPU", 8)) == "MULTI_GPU"
    assert name_of(state("FSDP", 8)) == "FSDP2"


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environ", "complaints"),
    [
        ({}, []),
        (FSDP, []),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP1 is not supported: write `fsdp_version: 2`"]),
        (
            {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["fsdp_activation_checkpointing: turn it off, use --gradient_checkpointing"],
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM: choose DEEPSPEED or FSDP"]),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ["parallelism_config: ranks share examples only", "torch.compile is not supported"],
        ),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_told_at_once(
    environ: dict[str, str], complaints: list[str]
) -> None:
    found = launch_problems("fp32", environ, bf16=True)

    assert len(found) == len(complaints)
    for problem, complaint in zip(found, complaints, strict=True):
        assert complaint in problem


def test_bf16_without_support_is_refused() -> None:
    assert launch_problems("bf16", {}, bf16=False) == [
        "this GPU has no bf16: train with --dtype fp32"
    ]
    assert launch_problems("bf16", {}, bf16=True) == []
    assert launch_problems("fp32", {}, bf16=False) == []


BF16 = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}


@pytest.mark.parametrize(
    ("config", "dtype", "complaints"),
    [
        ({}, "fp32", []),
        (BF16, "bf16", []),
        (BF16, "fp32", ["says bf16, --dtype says fp32"]),
        ({}, "bf16", ["says fp32, --dtype says bf16"]),
        ({"fp16": {"enabled": True}}, "fp32", ["says fp16, --dtype says fp32"]),
        (
            {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}},
            "fp32",
            ["'optimizer': remove it", "'scheduler': remove it"],
        ),
        ({"zero_optimization": {"stage": 0}}, "fp32", ["stage 0 shards nothing"]),
        ({"tensor_parallel": {"autotp_size": 2}}, "fp32", ["tensor parallelism"]),
    ],
)
def test_a_deepspeed_config_file_that_contradicts_the_flags_is_refused(
    config: dict[str, Any], dtype: str, complaints: list[str]
) -> None:
    found = deepspeed_problems({"zero_optimization": {"stage": 2}} | config, dtype)

    assert len(found) == len(complaints)
    for problem, complaint in zip(found, complaints, strict=True):
        assert complaint in problem


def test_a_launchers_accumulation_steps_divide_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = start("fp32")
    weight = torch.ones(1, requires_grad=True)

    accelerator.backward(3 * weight.sum())

    AcceleratorState._reset_state(True)
    assert weight.grad is not None
    assert weight.grad.item() == 3


def test_deepspeed_clips_at_what_the_stage_says_and_never_divides() -> None:
    config: dict[str, Any] = {
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": 16,
        "train_batch_size": 64,
        "zero_optimization": {"stage": 3},
    }

    configure_deepspeed(config, 0.3)

    assert config == {
        "gradient_clipping": 0.3,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }


def test_deepspeed_sums_bf16_gradients_in_float32() -> None:
    config: dict[str, Any] = {**BF16, "zero_optimization": {"stage": 2}}

    configure_deepspeed(config, 0.0)

    assert config["communication_data_type"] == "fp32"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_fsdp_computes_in_bf16_but_returns_and_reduces_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    plugin = fsdp_plugin("bf16")
    plugin.set_mixed_precision("bf16")  # accelerate does, and must not put its own in place

    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None
    assert fsdp_plugin("fp32").mixed_precision_policy is None


def test_a_models_layers_are_named_or_asked_for() -> None:
    assert decoder_layers(trainables.tiny_model()) == ["LlamaDecoderLayer"]
    with pytest.raises(DataError, match="Linear doesn't say what its layers are: name their class"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_whole_parameters_under_fsdp_are_refused() -> None:
    policy = torch.nn.Linear(2, 2)

    refuse_unsharded(state("MULTI_GPU", 2), policy)
    with pytest.raises(DataError, match="2 parameters aren't sharded: weight"):
        refuse_unsharded(state("FSDP", 2), policy)
