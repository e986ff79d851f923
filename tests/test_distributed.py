"""What one process trains, any split of a batch and any strategy train: really launched.

Every run asserts how many processes were active: accelerate falls back to one without a word.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from stages.refuel import Config, Refuel, Task, main
from tests import trainables

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONFIGS = ROOT / "accelerate_cfgs"
CPU = {"ACCELERATE_USE_CPU": "true"}
MAX_GRAD_NORM = 25.0
"""Between the norms of the updates: Adam doesn't see by how much all gradients are scaled."""
PAIRS, UPDATES = 37, 5  # of eight pairs, but for the last


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launch(launcher: list[str], made: Path, out: Path, *flags: str, **environ: str) -> str:
    """Run five updates of eight pairs, four a process; return what it printed."""
    command = [
        *(*launcher, str(ROOT / "stages" / "refuel.py"), "--task.query_dataset"),
        *(str(made / "pairs"), "--base_model", str(made / "policy"), "--output_dir", str(out)),
        *("--lr", "1e-3", "--refuel.eta", "2", "--total_episodes", str(PAIRS)),
        *("--max_grad_norm", str(MAX_GRAD_NORM), "--max_tokens_per_microbatch", "128"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"),
        *("--print_sample_output_freq", "4", *flags),
    ]
    return run(command, out.parent, **environ)


def run(command: list[str], folder: Path, **environ: str) -> str:
    """Run a command in a session of its own, so that none of its processes outlives a test."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    with subprocess.Popen(
        command,
        env={**known, "OMP_NUM_THREADS": "1", **environ},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            stdout, stderr = started.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            raise
    assert started.returncode == 0, stdout + stderr
    return stdout


def train_alone(made: Path, out: Path, local: int = 8, steps: int = 1, lora_r: int = 0) -> Path:
    """Train what `launch` trains, in this process; return the model folder."""
    main(
        Config(
            task=Task(query_dataset=str(made / "pairs")),
            base_model=str(made / "policy"),
            output_dir=str(out),
            refuel=Refuel(eta=2.0),
            lr=1e-3,
            total_episodes=PAIRS,
            max_grad_norm=MAX_GRAD_NORM,
            max_tokens_per_microbatch=128,
            per_device_train_batch_size=local,
            gradient_accumulation_steps=steps,
            print_sample_output_freq=4,
            lora_r=lora_r,
        )
    )
    AcceleratorState._reset_state(True)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a policy and its pairs."""
    folder = tmp_path_factory.mktemp("made")
    trainables.policy_folder(folder / "policy")
    trainables.pairs_repo(folder / "pairs", train=PAIRS, test=5)
    return folder


@pytest.fixture(scope="module")
def one(made: Path) -> Path:
    """Return what a single process makes of them, with clipping at some updates but not at all."""
    out = train_alone(made, made / "one")
    norms = [line["grad_norm"] for line in trainables.metrics(out) if "grad_norm" in line]
    assert 0 < sum(norm > MAX_GRAD_NORM for norm in norms) < UPDATES == len(norms)
    assert min(abs(norm - MAX_GRAD_NORM) for norm in norms) > 0.1
    return out


@pytest.fixture(scope="module")
def one_lora(made: Path) -> Path:
    """Return what a single process makes of them with adapters of rank 4."""
    return train_alone(made, made / "one_lora", lora_r=4)


def assert_equal_training(made: Path, one: Path, other: Path) -> None:
    """Compare losses, gradient norms and weights after five updates with the single process."""
    ours, theirs = trainables.metrics(one), trainables.metrics(other)
    assert [line["update"] for line in theirs] == [line["update"] for line in ours]
    assert [line["update"] for line in ours] == [0, 1, 2, 3, 4, 4, 5, 5]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        # Before anything has moved, the sign of Δ_chosen − Δ_reject is that of a rounding error;
        # the passes of more ranks have other paddings.
        noise = {"sign_align", "val_sign_align"} if a["update"] < 2 else set()
        noise |= {"tokens_per_s", "peak_memory_gb", "padding_share"}
        for name in a.keys() - noise:
            assert b[name] == pytest.approx(a[name], rel=2e-5, abs=2e-5), (a["update"], name)
    alone, split = (load_file(folder / "model.safetensors") for folder in (one, other))
    before = load_file(made / "policy" / "model.safetensors")
    assert alone.keys() == split.keys() == before.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(split[name], weight, rtol=0, atol=2e-6, msg=name)
    assert max((alone[name] - before[name]).abs().max().item() for name in alone) > 1e-3


def torchrun() -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]


def accelerate(config: str) -> list[str]:
    port = ("--main_process_port", free_port())
    return [str(BIN / "accelerate"), "launch", *port, "--config_file", str(CONFIGS / config)]


def test_eight_pairs_at_once_equal_eight_accumulated(made: Path, one: Path) -> None:
    accumulated = train_alone(made, made / "accumulated", local=1, steps=8)

    assert_equal_training(made, one, accumulated)
    last = [line["examples_seen"] for line in trainables.metrics(one) if "examples_seen" in line]
    assert last == [8, 16, 24, 32, PAIRS]


def test_two_processes_equal_one(made: Path, one: Path, tmp_path: Path) -> None:
    said = launch(torchrun(), made, tmp_path / "two", **CPU)

    assert "2 process(es), MULTI_CPU, cpu:0, fp32" in said
    assert_equal_training(made, one, tmp_path / "two")


def test_fsdp2_on_two_processes_equals_one(made: Path, one: Path, tmp_path: Path) -> None:
    said = launch(accelerate("cpu_fsdp2.yaml"), made, tmp_path / "two", **CPU)

    assert "2 process(es), FSDP2, cpu:0, fp32" in said
    assert_equal_training(made, one, tmp_path / "two")


@pytest.mark.parametrize(
    "stage", [pytest.param(3, id="zero3"), pytest.param(2, id="zero2", marks=pytest.mark.slow)]
)
def test_deepspeed_on_two_processes_equals_one(
    stage: int, made: Path, one: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")

    said = launch(accelerate(f"cpu_zero{stage}.yaml"), made, tmp_path / "two", DS_ACCELERATOR="cpu")

    assert f"2 process(es), DEEPSPEED ZeRO-{stage}, cpu, fp32" in said
    assert_equal_training(made, one, tmp_path / "two")


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [
        pytest.param("cpu_fsdp2.yaml", CPU, id="fsdp2"),
        pytest.param(
            "cpu_zero3.yaml", {"DS_ACCELERATOR": "cpu"}, id="zero3", marks=pytest.mark.slow
        ),
        pytest.param(
            "cpu_zero2.yaml", {"DS_ACCELERATOR": "cpu"}, id="zero2", marks=pytest.mark.slow
        ),
        pytest.param("multi_cpu.yaml", CPU, id="ddp", marks=pytest.mark.slow),
    ],
)
def test_adapters_under_recomputation_on_two_processes_equal_one(
    launcher: str, environ: dict[str, str], made: Path, one_lora: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs the lora extra")
    if "zero" in launcher:
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    flags = ("--lora_r", "4", "--gradient_checkpointing")

    said = launch(accelerate(launcher), made, tmp_path / "two", *flags, **environ)

    assert "2 process(es)" in said
    assert "LoRA: adapters of rank 4 on 14 layers train" in said
    assert_equal_training(made, one_lora, tmp_path / "two")


def test_what_fsdp2_shards_it_returns_whole(made: Path, tmp_path: Path) -> None:
    """Several claims about two ranks, in bf16: see tests/fsdp_ranks.py."""
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    script = str(ROOT / "tests" / "fsdp_ranks.py")

    said = run([*torchrun(), script], tmp_path, PYTHONPATH=str(ROOT), **CPU, **fsdp)

    assert said.count("every claim holds") == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_in_bf16_sums_gradients_as_one_process_does(
    stage: int, made: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    norms = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        launcher = [*accelerate(f"cpu_zero{stage}.yaml"), "--num_processes", processes]
        steps = ("--gradient_accumulation_steps", str(8 // int(processes)), "--dtype", "bf16")
        # A pair a pass, so that what a rank adds up doesn't depend on which rank it is.
        passes = ("--max_tokens_per_microbatch", "1")

        said = launch(launcher, made, out, *steps, *passes, DS_ACCELERATOR="cpu")

        assert f"{processes} process(es), DEEPSPEED ZeRO-{stage}, cpu, bf16" in said
        lines = [line for line in trainables.metrics(out) if "grad_norm" in line]
        norms.append([line["grad_norm"] for line in lines])
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-6)
    # From then on a weight may be rounded to another neighbour in bf16.
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.slow
def test_the_cpu_configuration_for_plain_data_parallelism_starts_two(
    made: Path, one: Path, tmp_path: Path
) -> None:
    said = launch(accelerate("multi_cpu.yaml"), made, tmp_path / "two", **CPU)

    assert "2 process(es), MULTI_CPU, cpu:0, fp32" in said
    assert_equal_training(made, one, tmp_path / "two")


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
