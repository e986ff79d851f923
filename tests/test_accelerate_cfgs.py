"""Each accelerate configuration holds live lines only: changing any of them changes the launch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = sorted((Path(__file__).parent.parent / "accelerate_cfgs").glob("*.yaml"))
OTHER = {
    "distributed_type": "NO",
    "fsdp_auto_wrap_policy": "NO_WRAP",
    "fsdp_version": 1,
    "mixed_precision": "fp16",
    "num_machines": 2,
    "num_processes": 6,
    "offload_optimizer_device": "nvme",
    "offload_param_device": "nvme",
    "zero3_init_flag": False,
    "zero_stage": 1,
}
"""Another value for each line that may appear. The stages write gradient clipping, accumulation and
the gathering of weights themselves; lines with these would be dead."""


def launch(config: dict[str, Any], folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the environment that accelerate would start the processes in, and its own flags."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "--main_process_port", "0", "x.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environ = prepare_deepspeed_cmd_env(args)
    else:
        environ = prepare_multi_gpu_env(args)
    kinds = ("use_deepspeed", "use_fsdp", "multi_gpu", "nproc_per_node", "nnodes")
    return environ, {name: getattr(args, name, None) for name in kinds}


def lines(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (the mapping that holds it, its key) of every line with a value."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from lines(value)
        else:
            yield config, key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_line_is_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # accelerate appends to it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = yaml.safe_load(path.read_text())
    as_it_is = launch(config, tmp_path)

    assert [key for _, key in lines(config) if key not in OTHER] == []
    for mapping, key in lines(config):
        value = mapping[key]
        assert value != OTHER[key], f"{key}: the test changes nothing"
        mapping[key] = OTHER[key]
        assert launch(config, tmp_path) != as_it_is, f"{key} is dead"
        mapping[key] = value
    assert launch(config, tmp_path) == as_it_is


def test_the_configurations_that_the_documentation_names_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    gpu = {"ds_config2", "deepspeed_config", "deepspeed_offload", "fsdp2", "multi_gpu"}
    assert names == gpu | {"multi_cpu", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"}
