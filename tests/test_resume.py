"""kill -9 at any moment, alone and on two processes: the same weights and the same curves."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.schedule import plan_updates
from stages import refuel
from tests import trainables
from tests.test_distributed import BIN, CONFIGS, ROOT, free_port

TIMINGS = {"tokens_per_s", "peak_memory_gb"}

# Imports once, then forks: a kill costs two seconds instead of ten. A child is killed up to 30 ms
# after a file appeared that wasn't there before, or when a file that is there has grown.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import accelerate, deepspeed, torch, transformers
import pipeline.checkpoints
from pipeline import cluster, preferences, training
from pipeline.config import parse
from stages import refuel

out, *patterns = sys.argv[1].split(",")
sys.argv = ["stages/refuel.py", *sys.argv[2:]]
checkpoints, delays = out + ".checkpoints", random.Random(3)

def seen(pattern):
    try:
        return {(path, path.stat().st_size) for path in Path(out).parent.glob(pattern)}
    except FileNotFoundError:  # moved on while we looked
        return set()

for pattern in [*patterns, None]:
    before = seen(pattern) if pattern else set()
    child = os.fork()
    if child == 0:
        refuel.main(parse(refuel.Config))
        sys.stdout.flush()
        os._exit(0)
    while pattern and not seen(pattern) - before:
        there = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
        assert len(there) <= 2, there  # the one that is kept, and one being built or removed
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"it ended before {pattern} was there"
        time.sleep(0.001)
    if pattern:
        time.sleep(delays.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        print("killed with", len(seen("*/*.building")), "half-built", flush=True)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (-9 if pattern else 0), ended
"""
MOMENTS = [
    "*.work/**/journal-00000.jsonl",
    "*.work/metrics.jsonl",
    "*.checkpoints/*.building",
    "*.checkpoints/*.building/resume/rank-00000.safetensors",
    "*.checkpoints/*.building/model.safetensors",
    "*.checkpoints/update-??????",
    "*.work/metrics.jsonl",
    "*.checkpoints/*.building/turnwise.json",
    "*.tmp-*/config.json",
]


def flags(made: Path, out: Path, local: int = 4, total: int = 64) -> list[str]:
    """Return the flags of a run whose updates take four pairs, every second of them saved."""
    return [
        *("--task.query_dataset", str(made / "pairs"), "--base_model", str(made / "policy")),
        *("--output_dir", str(out), "--lr", "1e-3", "--refuel.eta", "2"),
        *("--total_episodes", str(total), "--save_every_updates", "2"),
        *("--per_device_train_batch_size", str(local), "--gradient_accumulation_steps", "1"),
        *("--print_sample_output_freq", "7"),
    ]


def environment(**more: str) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return {**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def curves(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in one.items() if k not in TIMINGS} for one in trainables.metrics(folder)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    trainables.policy_folder(folder / "policy")
    trainables.pairs_repo(folder / "pairs", train=12, test=4)
    return folder


def kill_at(moments: list[str], made: Path, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, ",".join([str(out), *moments]), *flags(made, out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kills_at_any_moment_change_no_bit(made: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one" / "it1", tmp_path / "other" / "it1"
    for out in (one, other):
        out.parent.mkdir()
    kill_at([], made, one)

    said = kill_at(MOMENTS, made, other)

    assert said.count("killed with") == len(MOMENTS)
    assert said.count("killed with 1 half-built") >= 2
    assert said.count("going on after update 14") == 1
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    evaluated = [0, 7, 14, 16]
    assert [line["update"] for line in curves(one)] == sorted([*range(1, 17), *evaluated])
    assert curves(one) == curves(other)
    assert sorted(path.name for path in other.parent.iterdir()) == ["it1", "it1.checkpoints"]
    (kept,) = (other.parent / "it1.checkpoints").iterdir()
    assert (kept.name, (kept / "resume").exists()) == ("update-000014", False)


def accelerate(config: str) -> list[str]:
    port = ("--main_process_port", free_port(), "--config_file", str(CONFIGS / config))
    return [str(BIN / "accelerate"), "launch", *port, str(ROOT / "stages" / "refuel.py")]


def run(command: list[str], **environ: str) -> str:
    done = subprocess.run(
        command,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_saving(command: list[str], log: Path, building: Path, **environ: str) -> None:
    """Start a run; kill -9 its launcher and all of its ranks while they save."""
    with log.open("w") as told:
        launcher = psutil.Popen(command, env=environment(**environ), stdout=told, stderr=told)
    while not building.exists():
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.001)
    every = [launcher, *launcher.children(recursive=True)]
    for process in every:
        process.kill()
    psutil.wait_procs(every)


SLOW = pytest.mark.slow
DEEPSPEED, CPU = {"DS_ACCELERATOR": "cpu"}, {"ACCELERATE_USE_CPU": "true"}
STRATEGIES = [
    pytest.param("cpu_zero3.yaml", "DEEPSPEED ZeRO-3", DEEPSPEED, id="zero3"),
    pytest.param("cpu_zero2.yaml", "DEEPSPEED ZeRO-2", DEEPSPEED, id="zero2", marks=SLOW),
    pytest.param("cpu_fsdp2.yaml", "FSDP2", CPU, id="fsdp2", marks=SLOW),
    pytest.param("multi_cpu.yaml", "MULTI_CPU", CPU, id="copies", marks=SLOW),
]


@pytest.mark.parametrize(("config", "strategy", "environ"), STRATEGIES)
def test_two_processes_killed_while_they_save_go_on_to_the_same_bits(
    config: str, strategy: str, environ: dict[str, str], made: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    run([*accelerate(config), *flags(made, one, local=2, total=24)], **environ)
    stopped = [*accelerate(config), *flags(made, other, local=2, total=24)]
    building = tmp_path / "other.checkpoints" / "update-000004.building"
    kill_saving(stopped, tmp_path / "killed.log", building, **environ)
    assert (building.parent / "update-000002" / "resume").is_dir()

    said = run([*accelerate(config), *flags(made, other, local=2, total=24)], **environ)

    assert f"2 process(es), {strategy}, cpu" in said
    assert re.search(r"going on after update [24], from", said)
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert curves(one) == curves(other)


def test_every_rank_names_the_prompts_of_all_ranks_when_the_loss_is_not_finite(
    tmp_path: Path,
) -> None:
    trainables.policy_folder(tmp_path / "policy")
    trainables.pairs_repo(tmp_path / "pairs", train=12)
    command = [*accelerate("multi_cpu.yaml"), *flags(tmp_path, tmp_path / "out", local=2)]

    done = subprocess.run(
        [*command, "--refuel.eta", "1e200"],  # its square is more than float64 holds
        env=environment(**CPU),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode != 0
    first = plan_updates(12, 4, 64, refuel.Config.seed)[0]
    prompts = ", ".join(sorted(f"p{i:03d}" for i in first))
    told = f"error: update 1: the loss is not finite for the prompts {prompts}. No step"
    assert done.stderr.count(told) == 2
    assert not (tmp_path / "out").exists()
