"""Save training and go on from there: a model folder, and what the next update needs besides.

`<output_dir>.checkpoints/update-000050/` is a model folder like the final one, and in `resume/`

- `rank-00000.safetensors`, one for each rank that holds a shard: the float32 weights that the
  optimizer steps, and its moments. Where every rank holds all of it there is one file;
- `state.json`, written last: the update, how it was run, the last metrics, the sha256 of those
  files and of the model's manifest.

On several nodes all ranks have to see that folder. Nothing else decides the next update: its
examples and its learning rate are functions of its number, and so is what a policy draws
(`train_steps` seeds it).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import manifest as manifests
from pipeline.claims import say
from pipeline.config import config_hash
from pipeline.errors import DataError
from pipeline.manifest import MANIFEST
from pipeline.model_folders import RESUME, building_of
from pipeline.models import DTYPES, gather_weights, write_folder
from pipeline.strategy import name_of

STATE = "state.json"
ZERO_WEIGHTS = (
    "fp32_partitioned_groups_flat",  # ZeRO-3
    "single_partition_of_fp32_groups",  # ZeRO-2, and 1 in float32
    "fp32_groups_flat_partition",  # ZeRO-1 in bf16
)
"""Where DeepSpeed 0.19's optimizers keep the weights that they step on this rank."""


def save(ready: Any, config: Any, output: Any, update: int, metrics: Mapping[str, float]) -> None:
    """Write the checkpoint of an update, whole or not at all. Call on every rank.

    `ready` is what `prepare` gave, `output` the ModelRun, `metrics` the last ones.
    """
    accelerator, dtype = ready.accelerator, DTYPES[config.precision]
    placed = output.checkpoint(update)
    resume = building_of(placed) / RESUME
    weights = gather_weights(accelerator, ready.policy, dtype)
    try:
        if accelerator.is_main_process:
            output.begin_checkpoint(update)
        accelerator.wait_for_everyone()
        entries = write_shards(accelerator, ready.optimizer, resume)
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(ready.policy).model
            output.fill(
                building_of(placed),
                lambda folder: write_folder(model, weights, ready.tokenizer, folder, dtype),
                {"name": str(placed), "metrics": metrics, "extra": {"update": update}},
            )
            state = {"update": update, "metrics": dict(metrics), **how_run(accelerator, output)}
            write_state(building_of(placed), state, entries)
            output.place_checkpoint(update, config.keep_checkpoints)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"can't write the checkpoint {placed}: {error}. The one before it is as it was: make "
            "room, then run the same command again"
        ) from error


def resume(ready: Any, config: Any, output: Any) -> tuple[int, dict[str, float]]:
    """Bring policy and optimizer to the newest sound checkpoint; return its update and metrics.

    (0, {}) where there is none. Call on every rank, when nothing needs the base policy any more.
    Raises DataError where no checkpoint is sound, or where this run can't go on from it.
    """
    accelerator = ready.accelerator
    if config.save_every_updates:
        trained(ready.optimizer)  # what can't be saved is refused now, not after many updates
    if accelerator.is_main_process:
        output.clear_leftovers()
        if config.resume == "never":
            output.discard_checkpoints()
    accelerator.wait_for_everyone()
    problems = []
    for folder in [p for p in output.checkpoints() if (p / RESUME).exists()]:
        problem = first_of(accelerator, damage(folder, accelerator))
        if problem is None:
            return load(ready, output, folder)
        say(f"{folder} is damaged and left aside: {problem}")
        problems.append(f"{folder}: {problem}")
    if problems:
        raise DataError(
            f"no checkpoint is sound, nothing was touched: {'; '.join(problems)}. --resume never "
            "removes them and starts from the base model"
        )
    return 0, {}


def load(ready: Any, output: Any, folder: Path) -> tuple[int, dict[str, float]]:
    """Bring policy, optimizer and metrics.jsonl to a sound checkpoint. Call on every rank."""
    accelerator, state = ready.accelerator, read_state(folder)
    refuse_other(state, accelerator, output, folder)
    load_shard(ready.policy, ready.optimizer, shard_path(folder / RESUME, accelerator))
    if accelerator.is_main_process:
        lines = (folder / "metrics.jsonl").read_bytes()
        manifests.write_atomically(output.work / "metrics.jsonl", lines)
    say(f"going on after update {state['update']}, from {folder}")
    return state["update"], state["metrics"]


def how_run(accelerator: Any, output: Any) -> dict[str, Any]:
    """Return what a run has to share with a checkpoint to go on from it, for state.json."""
    return {
        "config_hash": output.claim.job.config_hash,
        "sharded": sharded(accelerator),
        "strategy": name_of(accelerator.state),
        "world_size": accelerator.num_processes,
    }


def sharded(accelerator: Any) -> bool:
    """Say whether each rank holds a part of the optimizer's state only."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return bool(plugin.zero_stage > 0)
    return bool(accelerator.distributed_type.value == "FSDP")


def shard_path(resume: Path, accelerator: Any) -> Path:
    """Name the file that this rank reads."""
    part = accelerator.process_index if sharded(accelerator) else 0
    return resume / f"rank-{part:05d}.safetensors"


def write_state(folder: Path, state: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write state.json with a hash of its own values."""
    state["files"] = [*shards, manifests.describe_file(folder, folder / MANIFEST)]
    state["seal"] = config_hash(state)
    manifests.write_atomically(folder / RESUME / STATE, manifests.dump(state))


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises DataError where it is missing or was changed."""
    state = manifests.read_json(folder / RESUME / STATE)
    if state is None:
        raise DataError(f"{RESUME}/{STATE} is missing")
    if state.pop("seal", None) != config_hash(state):
        raise DataError(f"{RESUME}/{STATE} isn't what was written")
    return state


def damage(folder: Path, accelerator: Any) -> str | None:
    """Say what is broken in a checkpoint: rank 0 looks at the model, each rank at its shard."""
    try:
        state = read_state(folder)
        shards = [one for one in state["files"] if one["path"].startswith(RESUME)]
        mine = shards[accelerator.process_index % len(shards)]
        manifests.verify(folder, {"files": [mine]}, "")
        if accelerator.is_main_process:
            manifests.verify(folder, {"files": [e for e in state["files"] if e not in shards]}, "")
            manifests.verify(folder, manifests.read_json(folder / MANIFEST) or {}, "")
    except DataError as error:
        return str(error).removeprefix(f"{folder} changed after it was finished: ").rstrip(". ")
    return None


def first_of(accelerator: Any, problem: str | None) -> str | None:
    """Return the first rank's problem, the same on all ranks."""
    from accelerate.utils import gather_object

    return next((found for found in gather_object([problem]) if found is not None), None)


def refuse_other(state: Mapping[str, Any], accelerator: Any, output: Any, folder: Path) -> None:
    """Raise DataError where this run can't go on from a sound checkpoint."""
    now = how_run(accelerator, output)
    names = ["sharded", "strategy", "world_size"] if state["sharded"] else ["sharded"]
    found = [f"{n}: {state[n]} -> {now[n]}" for n in names if state[n] != now[n]]
    if state["config_hash"] != now["config_hash"]:
        manifest = manifests.read_json(folder / MANIFEST) or {}
        found += manifests.differences(manifest["identity"], output.claim.job.identity)
    if found:
        raise DataError(
            f"can't go on from {folder}. What differs (there -> now): {'; '.join(found)}. Start "
            "this run as that one was, or give --resume never: it removes the checkpoints and "
            "starts from the base model"
        )


def trained(optimizer: Any) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Return the float32 weights that a prepared optimizer steps on this rank, and torch's own.

    That one holds their moments. ZeRO steps flat partitions, not the policy's parameters. Raises
    DataError for what isn't known.
    """
    outer = optimizer.optimizer
    for name in ZERO_WEIGHTS:
        if hasattr(outer, name):
            if getattr(outer, "swap_optimizer", False):
                raise DataError("an optimizer on NVMe can't be saved: give --save_every_updates 0")
            return list(getattr(outer, name)), outer.optimizer
    if isinstance(outer, torch.optim.Optimizer):
        return [p for group in outer.param_groups for p in group["params"]], outer
    raise DataError(
        f"the state of {type(outer).__name__} can't be saved: use ZeRO stage 2 or 3, or give "
        "--save_every_updates 0"
    )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor (FSDP2's are DTensors)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def write_shards(accelerator: Any, optimizer: Any, resume: Path) -> list[dict[str, Any]]:
    """Write what this rank holds; return the manifest's entries of all ranks' files."""
    path = shard_path(resume, accelerator)
    digest = bytes(32)
    if sharded(accelerator) or accelerator.is_main_process:
        write_shard(optimizer, path)
        manifests.sync_file(path)
        digest = bytes.fromhex(manifests.sha256_of(path))
    gathered = accelerator.gather(torch.tensor([list(digest)], device=accelerator.device))
    digests = [bytes(row).hex() for row in gathered.tolist()]
    parts = range(accelerator.num_processes if sharded(accelerator) else 1)
    names = [f"rank-{part:05d}.safetensors" for part in parts]
    return [
        {"path": f"{RESUME}/{name}", "bytes": (resume / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=False)
    ]


def write_shard(optimizer: Any, path: Path) -> None:
    """Write this rank's weights and their moments; plain numbers go into the file's metadata."""
    weights, inner = trained(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for i, weight in enumerate(weights):
        tensors[f"{i}.weight"] = local(weight)
        for name, value in inner.state.get(weight, {}).items():
            if torch.is_tensor(value):
                tensors[f"{i}.{name}"] = local(value)
            else:
                numbers[f"{i}.{name}"] = value
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, path, {"numbers": json.dumps(numbers)})


@torch.no_grad()
def load_shard(policy: Any, optimizer: Any, path: Path) -> None:
    """Copy a shard into the optimizer, and from its weights into the policy. Call on every rank.

    Raises DataError where the shard holds other tensors.
    """
    weights, inner = trained(optimizer)
    with safe_open(path, framework="pt") as file:
        held = set(file.keys())
        shapes = {k: file.get_slice(k).get_shape() for k in held if k.endswith(".weight")}
        if shapes != {f"{i}.weight": list(local(w).shape) for i, w in enumerate(weights)}:
            raise DataError(
                f"{path} holds the weights of another model or of other partitions: start this run "
                "as that one was, or give --resume never"
            )
        drop_gathered(policy, optimizer.optimizer)
        for name, value in json.loads(file.metadata()["numbers"]).items():
            i, key = name.split(".", 1)
            inner.state[weights[int(i)]][key] = value
        for name in sorted(held):
            i, key = name.split(".", 1)
            weight, value = weights[int(i)], file.get_tensor(name)
            if key == "weight":
                local(weight).copy_(value)
            else:
                inner.state[weight][key] = placed_like(weight, value, inner)
    after_loading(optimizer.optimizer)


def placed_like(weight: Tensor, value: Tensor, inner: torch.optim.Optimizer) -> Tensor:
    """Return a moment where its weight is, sharded like it; a step count where torch wants it."""
    if value.ndim == 0:
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        return value.to(weight.device) if on_device else value
    moment = torch.zeros_like(weight, dtype=value.dtype)
    local(moment).copy_(value)
    return moment


def drop_gathered(policy: Any, outer: Any) -> None:
    """Let FSDP2 and ZeRO-3 forget the whole weights that they still hold from the last pass."""
    for module in policy.modules():
        if hasattr(module, "reshard"):  # FSDP2 keeps those of its root until a backward pass
            module.reshard()
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        outer.checkpoint_event_prologue()


def after_loading(outer: Any) -> None:
    """Let ZeRO bring the policy's parameters to the weights that it steps."""
    if hasattr(outer, "fp32_partitioned_groups_flat"):
        for i in range(len(outer.fp32_partitioned_groups_flat)):
            outer._reassign_or_swap_out_partitioned_parameters(i)
        outer.checkpoint_event_epilogue()
    elif hasattr(outer, "update_lp_params"):
        outer.update_lp_params()
