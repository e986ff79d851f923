"""Start accelerate, and refuse to run under another strategy or on fewer processes than asked.

accelerate falls back silently in several cases: `accelerate launch --cpu --num_processes 2` runs
one process, and an FSDP configuration on CPU trains unsharded copies.
"""

import gc
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pipeline.errors import DataError

ASKED_BY = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_FSDP": "FSDP"}


def start(
    dtype: str,
    num_processes: int = 0,
    *,
    max_grad_norm: float = 0.0,
    tracker: str = "none",
    curves: str | None = None,
) -> Any:
    """Return an Accelerator that runs what was asked for; print the world size and the strategy.

    `num_processes` 0 takes whatever is active; `curves` is where a tracker may write files. Raises
    DataError where something else is active.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from transformers.utils import logging

    # accelerate takes a backend as proof that a process group exists.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    backend = None if alone or torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        mixed_precision="bf16" if dtype == "bf16" else "no",
        log_with=None if tracker == "none" else tracker,
        project_dir=None if tracker == "none" else curves,
        # Rank 0 alone downloads and writes; the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=3))],
    )
    refuse_other_strategy(accelerator.state, num_processes, os.environ)
    if accelerator.state.deepspeed_plugin is not None:
        configure_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, max_grad_norm)
    if not accelerator.is_main_process:
        logging.disable_progress_bar()
    accelerator.print(
        f"{accelerator.num_processes} process(es), {name_of(accelerator.state)}, "
        f"{accelerator.device}, {dtype}"
    )
    return accelerator


def name_of(state: Any) -> str:
    """Name the active strategy, with its ZeRO stage."""
    name = str(state.distributed_type.value)
    plugin = state.deepspeed_plugin
    return name if plugin is None else f"{name} ZeRO-{plugin.zero_stage}"


def refuse_other_strategy(state: Any, num_processes: int, environ: Mapping[str, str]) -> None:
    """Raise DataError unless the strategy and world size that were asked for are active."""
    problems = []
    for variable, kind in ASKED_BY.items():
        asked = environ.get(variable, "false").lower() in ("true", "1")
        if asked and state.distributed_type.value != kind:
            problems.append(f"{kind} was asked for, {state.distributed_type.value} is active")
    expected = {
        "--num_processes": num_processes,
        "WORLD_SIZE": int(environ.get("WORLD_SIZE", "0")),
    }
    for origin, count in expected.items():
        if count and count != state.num_processes:
            problems.append(f"{origin} is {count}, {state.num_processes} process(es) are active")
    if problems:
        raise DataError(
            f"{'; '.join(problems)}. On CPU start several processes with `ACCELERATE_USE_CPU=true "
            "torchrun --nproc_per_node N`, or with a DeepSpeed config; FSDP needs GPUs."
        )


def configure_deepspeed(config: dict[str, Any], max_grad_norm: float) -> None:
    """Write into DeepSpeed's config what this house decides, so that strategies agree.

    accelerate would clip at 1.0. Micro-batches and their division are train_steps' own: DeepSpeed
    must neither count nor divide them.
    """
    config["gradient_clipping"] = max_grad_norm
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = 1
    config.pop("train_batch_size", None)
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def refuse_unsharded(accelerator: Any, policy: Any) -> None:
    """Raise DataError if the prepared policy isn't sharded though FSDP was asked for."""
    if accelerator.distributed_type.value != "FSDP":
        return
    if not all(hasattr(parameter, "full_tensor") for parameter in policy.parameters()):
        raise DataError("FSDP is active, but the policy's parameters are not sharded: use fsdp2")


def stop(accelerator: Any) -> None:
    """Wait for all ranks, finish the trackers and close the process groups. Call on every rank.

    DeepSpeed keeps references to groups that torch has destroyed; their threads, ended by the
    interpreter's exit instead of here, were seen to abort or to hang it.
    """
    accelerator.wait_for_everyone()
    if accelerator.state.deepspeed_plugin is not None:
        from deepspeed import comm

        comm.destroy_process_group()
    accelerator.end_training()
    gc.collect()
