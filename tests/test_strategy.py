"""A run goes on under the strategy and the processes that were asked for, or not at all."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.strategy import configure_deepspeed, name_of, refuse_other_strategy


def state(kind: str, processes: int, stage: int | None = None) -> Any:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=processes,
        deepspeed_plugin=plugin,
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


def test_the_strategy_is_named_with_its_zero_stage() -> None:
    assert name_of(state("DEEPSPEED", 2, 3)) == "DEEPSPEED ZeRO-3"
    assert name_of(state("MULTI_GPU", 8)) == "MULTI_GPU"


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
