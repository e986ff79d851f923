"""Start accelerate, and refuse to run under another strategy or on fewer processes than asked.

accelerate falls back silently in several cases: `accelerate launch --cpu --num_processes 2` runs
one process, and on CPU it ignores an FSDP configuration. Here the first is refused, and the second
shards as it does on GPUs.
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
    from transformers.utils import logging

    refuse(launch_problems(dtype, os.environ, bf16_works()))
    sharding = fsdp_plugin(dtype) if asked(os.environ, "ACCELERATE_USE_FSDP") else None
    trackers = {} if tracker == "none" else {"log_with": tracker, "project_dir": curves}
    accelerator = accelerator_of(dtype, sharding, trackers)
    if sharding is not None:
        shard_on_cpu_too(accelerator.state, sharding)
    refuse_other_strategy(accelerator.state, num_processes, os.environ)
    if accelerator.state.deepspeed_plugin is not None:
        deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
        refuse(deepspeed_problems(deepspeed, dtype))
        configure_deepspeed(deepspeed, max_grad_norm)
    if not accelerator.is_main_process:
        logging.disable_progress_bar()
    accelerator.print(
        f"{accelerator.num_processes} process(es), {name_of(accelerator.state)}, "
        f"{accelerator.device}, {dtype}"
    )
    return accelerator


def accelerator_of(dtype: str, sharding: Any, trackers: Mapping[str, Any]) -> Any:
    """Make the Accelerator, which starts the process group; DeepSpeed comes from the launcher."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin

    # accelerate takes a backend as proof that a process group exists.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    backend = None if alone or torch.cuda.is_available() else "gloo"
    return Accelerator(
        mixed_precision="bf16" if dtype == "bf16" else "no",
        fsdp_plugin=sharding,
        # Else a launcher's number of steps would divide every loss: train_step divides it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Rank 0 alone downloads and writes; the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=3))],
        **trackers,
    )


def name_of(state: Any) -> str:
    """Name the active strategy, with its ZeRO stage or its FSDP version."""
    name = str(state.distributed_type.value)
    if name == "FSDP":
        return f"{name}{state.fsdp_plugin.fsdp_version}"
    plugin = state.deepspeed_plugin
    return name if plugin is None else f"{name} ZeRO-{plugin.zero_stage}"


def asked(environ: Mapping[str, str], variable: str) -> bool:
    """Say whether a launcher has set a variable to true."""
    return environ.get(variable, "false").lower() in ("true", "1")


def refuse(problems: list[str]) -> None:
    """Raise DataError with all problems, if there are any."""
    if problems:
        raise DataError("; ".join(problems))


def bf16_works() -> bool:
    """Say whether the device multiplies in bf16; a CPU does, slowly where it has to emulate it."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def launch_problems(dtype: str, environ: Mapping[str, str], bf16: bool) -> list[str]:
    """Say what of the launcher's configuration can't be combined with this house.

    `bf16` tells whether the device has it.
    """
    found = []
    if dtype == "bf16" and not bf16:
        found.append("this GPU has no bf16: train with --dtype fp32")
    unsupported = {
        "ACCELERATE_USE_MEGATRON_LM": "distributed_type MEGATRON_LM: choose DEEPSPEED or FSDP",
        # Ranks that share an example would each count it.
        "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config: ranks share examples only by "
        "data parallelism (tensor, context and sequence parallelism are not supported)",
    }
    found += [reason for variable, reason in unsupported.items() if asked(environ, variable)]
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        found.append("dynamo_config: torch.compile is not supported, remove it")
    if asked(environ, "ACCELERATE_USE_FSDP"):
        found += fsdp_problems(environ)
    return found


def fsdp_problems(environ: Mapping[str, str]) -> list[str]:
    """Say what is wrong with the FSDP configuration that accelerate has handed on."""
    if environ.get("FSDP_VERSION", "1") != "2":
        return ["FSDP1 is not supported: write `fsdp_version: 2` into fsdp_config"]
    if asked(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        return ["fsdp_activation_checkpointing: turn it off, use --gradient_checkpointing"]
    return []


def deepspeed_problems(config: Mapping[str, Any], dtype: str) -> list[str]:
    """Say what in DeepSpeed's configuration (of a `deepspeed_config_file`) has to change."""
    found = [
        f"the DeepSpeed config has {name!r}: remove it, the stage brings its own"
        for name in ("optimizer", "scheduler")
        if name in config
    ]
    bf16, fp16 = (bool(config.get(name, {}).get("enabled")) for name in ("bf16", "fp16"))
    if fp16 or bf16 != (dtype == "bf16"):
        active = "fp16" if fp16 else "bf16" if bf16 else "fp32"
        found.append(
            f"the DeepSpeed config says {active}, --dtype says {dtype}: make them agree on fp32 or "
            'bf16 (`"bf16": {"enabled": true}`)'
        )
    if config.get("zero_optimization", {}).get("stage", 0) == 0:
        found.append("ZeRO stage 0 shards nothing: choose 1, 2 or 3, or distributed_type MULTI_GPU")
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        found.append("the DeepSpeed config asks for tensor parallelism, which is not supported")
    return found


def refuse_other_strategy(state: Any, num_processes: int, environ: Mapping[str, str]) -> None:
    """Raise DataError unless the strategy and world size that were asked for are active."""
    problems = []
    for variable, kind in ASKED_BY.items():
        if asked(environ, variable) and state.distributed_type.value != kind:
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
            "torchrun --nproc_per_node N`, or with one of accelerate_cfgs/cpu_*.yaml."
        )


def fsdp_plugin(dtype: str) -> Any:
    """Return accelerate's FSDP2 settings, with a precision that rounds no log-prob and no sum.

    For bf16 accelerate would cast what the policy returns, the float32 log-probs, to bf16, and
    would sum the gradients of the ranks in it.
    """
    import torch
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if dtype != "bf16":
        return FullyShardedDataParallelPlugin()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def shard_on_cpu_too(state: Any, plugin: Any) -> None:
    """Make FSDP the active strategy of a group of CPU processes.

    accelerate 1.15 does so for accelerators only (AcceleratorState.__init__ in its state.py) and
    trains unsharded copies on CPU, although its FSDP2 code runs there: torch shards over gloo.
    """
    from accelerate import DistributedType
    from accelerate.state import PartialState

    if state.distributed_type == DistributedType.MULTI_CPU:
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin = plugin
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def configure_deepspeed(config: dict[str, Any], max_grad_norm: float) -> None:
    """Write into DeepSpeed's config what this house decides, so that strategies agree.

    accelerate would clip at 1.0. Micro-batches and their division are train_steps' own: DeepSpeed
    must neither count nor divide them. Sums of bf16 gradients are float32's: over micro-batches
    and ranks, bf16 would lose what is smaller than 1/256 of the sum so far.
    """
    config["gradient_clipping"] = max_grad_norm
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = 1
    config.pop("train_batch_size", None)
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if config.get("bf16", {}).get("enabled"):
        config["communication_data_type"] = "fp32"
        config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"


def distribute(accelerator: Any, policy: Any, optimizer: Any) -> tuple[Any, Any]:
    """Let accelerate shard a MaskedLogprobs and its optimizer; return both, prepared.

    Raises DataError where FSDP was asked for and something isn't sharded.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        # accelerate looks for the names on the wrapper, and would gather the whole model at once.
        plugin.transformer_cls_names_to_wrap = decoder_layers(policy.model)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    refuse_unsharded(accelerator, policy)
    return policy, optimizer


def decoder_layers(model: Any) -> list[str]:
    """Name the classes of a model's layers, which are sharded one by one."""
    present = {type(module).__name__ for module in model.modules()}
    names = sorted(set(getattr(model, "_no_split_modules", None) or ()) & present)
    if not names:
        raise DataError(
            f"{type(model).__name__} doesn't say what its layers are: name their class in "
            "fsdp_transformer_layer_cls_to_wrap, or train with DeepSpeed"
        )
    return names


def refuse_unsharded(accelerator: Any, policy: Any) -> None:
    """Raise DataError if FSDP is active and a parameter isn't sharded over all processes."""
    if accelerator.distributed_type.value != "FSDP":
        return
    whole = [name for name, p in policy.named_parameters() if not sharded(p, accelerator)]
    if whole:
        raise DataError(f"FSDP is active, but {len(whole)} parameters aren't sharded: {whole[0]}")


def sharded(parameter: Any, accelerator: Any) -> bool:
    """Say whether a parameter is a DTensor of which each process holds a part."""
    placements = getattr(parameter, "placements", ())
    return (
        any(placement.is_shard() for placement in placements)
        and parameter.device_mesh.size() == accelerator.num_processes
    )


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
