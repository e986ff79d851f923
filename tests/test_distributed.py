"""Two processes train what one trains: plain data parallelism and DeepSpeed, really launched.

Every run asserts how many processes were active: accelerate falls back to one without a word.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import trainables

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONFIGS = ROOT / "accelerate_cfgs"


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launch(launcher: list[str], made: Path, out: Path, local: int, **environ: str) -> str:
    """Run five updates of eight pairs (the last one ragged); return what it printed."""
    command = [
        *launcher,
        *(str(ROOT / "stages" / "refuel.py"), "--task.query_dataset", str(made / "pairs")),
        *("--base_model", str(made / "policy"), "--output_dir", str(out), "--lr", "1e-3"),
        *("--refuel.eta", "2", "--total_episodes", "37", "--max_grad_norm", "0.7"),
        *("--per_device_train_batch_size", str(local), "--gradient_accumulation_steps", "1"),
        *("--max_tokens_per_microbatch", "128", "--print_sample_output_freq", "4"),
    ]
    known = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    done = subprocess.run(
        command,
        env={**known, "OMP_NUM_THREADS": "1", **environ},
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a policy, its pairs, and `one`: what a single process makes of them."""
    folder = tmp_path_factory.mktemp("made")
    trainables.policy_folder(folder / "policy")
    trainables.pairs_repo(folder / "pairs", train=37, test=5)
    said = launch([sys.executable], folder, folder / "one", local=8)
    assert "1 process(es), NO, cpu, fp32" in said
    return folder


def assert_equal_training(made: Path, out: Path) -> None:
    """Compare losses, gradient norms and weights after five updates with the single process."""
    one, two = trainables.metrics(made / "one"), trainables.metrics(out)
    assert [line["update"] for line in two] == [line["update"] for line in one]
    assert [line["update"] for line in one] == [0, 1, 2, 3, 4, 4, 5, 5]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # Before anything has moved, the sign of Δ_chosen − Δ_reject is that of a rounding error.
        noise = {"sign_align", "val_sign_align"} if a["update"] < 2 else set()
        for name in a.keys() - {"tokens_per_s", "peak_memory_gb"} - noise:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=2e-5), (a["update"], name)
    alone, sharded = (load_file(f / "model.safetensors") for f in (made / "one", out))
    before = load_file(made / "policy" / "model.safetensors")
    assert alone.keys() == sharded.keys() == before.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=5e-5, msg=name)
    assert max((alone[n] - before[n]).abs().max().item() for n in alone) > 1e-3


def test_two_processes_equal_one(made: Path, tmp_path: Path) -> None:
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]

    said = launch(torchrun, made, tmp_path / "two", local=4, ACCELERATE_USE_CPU="true")

    assert "2 process(es), MULTI_CPU, cpu:0, fp32" in said
    assert_equal_training(made, tmp_path / "two")


def accelerate(config: str) -> list[str]:
    port = ("--main_process_port", free_port())
    return [str(BIN / "accelerate"), "launch", *port, "--config_file", str(CONFIGS / config)]


@pytest.mark.parametrize(
    "stage", [pytest.param(3, id="zero3"), pytest.param(2, id="zero2", marks=pytest.mark.slow)]
)
def test_deepspeed_on_two_processes_equals_one(stage: int, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

    said = launch(
        accelerate(f"cpu_zero{stage}.yaml"), made, tmp_path / "two", local=4, DS_ACCELERATOR="cpu"
    )

    assert f"2 process(es), DEEPSPEED ZeRO-{stage}, cpu, fp32" in said
    assert_equal_training(made, tmp_path / "two")


@pytest.mark.slow
def test_the_cpu_configuration_for_plain_data_parallelism_starts_two(
    made: Path, tmp_path: Path
) -> None:
    said = launch(
        accelerate("multi_cpu.yaml"), made, tmp_path / "two", local=4, ACCELERATE_USE_CPU="true"
    )

    assert "2 process(es), MULTI_CPU, cpu:0, fp32" in said
    assert_equal_training(made, tmp_path / "two")


@pytest.mark.slow
def test_a_launch_that_silently_runs_one_process_is_refused(made: Path, tmp_path: Path) -> None:
    launcher = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, str(ROOT / "stages" / "refuel.py"), "--num_processes", "2"]
    command += ["--task.query_dataset", str(made / "pairs"), "--base_model", str(made / "policy")]

    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert done.returncode != 0
    assert "--num_processes is 2, 1 process(es) are active" in done.stderr
    assert not (tmp_path / "out").exists()
