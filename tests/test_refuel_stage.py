"""REFUEL and SFT as a user runs them: pairs and a policy folder in, a policy folder out."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from pipeline import store
from pipeline.config import parse
from pipeline.errors import DataError
from stages import logprobs, refuel, sft
from tests import trainables


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    trainables.policy_folder(folder / "policy")
    trainables.pairs_repo(folder / "pairs", train=11, test=4)
    trainables.groups_repo(folder / "groups")
    return folder


def refuel_config(made: Path, out: Path, **changes: Any) -> refuel.Config:
    config = refuel.Config(
        base_model=str(made / "policy"),
        output_dir=str(out),
        task=refuel.Task(query_dataset=str(made / "pairs")),
        refuel=refuel.Refuel(eta=2.0),
        lr=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        total_episodes=22,
        print_sample_output_freq=3,
    )
    return dataclasses.replace(config, **changes)


def squared_gaps(made: Path, split: str) -> list[float]:
    rows = store.open_repo(str(made / "pairs")).table(split).to_pylist()
    return [(row["chosen_reward"] - row["reject_reward"]) ** 2 for row in rows]


def test_a_run_trains_evaluates_and_saves_a_folder_that_loads(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "it1"

    refuel.main(refuel_config(made, out))

    lines = trainables.metrics(out)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "val_loss" in line]
    assert [line["update"] for line in steps] == [1, 2, 3, 4, 5, 6]  # 4 + 4 + 3 pairs, twice
    assert [line["update"] for line in checks] == [0, 3, 6]
    assert checks[0]["val_loss"] == pytest.approx(4 * np.mean(squared_gaps(made, "test")), rel=1e-5)
    assert abs(checks[0]["val_delta_chosen"]) < 1e-6
    assert abs(steps[0]["delta_chosen"]) < 1e-6
    assert abs(steps[1]["delta_chosen"]) > 1e-4
    assert steps[0].keys() == {
        "update",
        "loss",
        "sign_align",
        "delta_chosen",
        "delta_reject",
        "reward_gap",
        "grad_norm",
        "padding_share",
        "tokens_per_s",
        "lr",
        "examples_seen",
        "peak_memory_gb",
    }
    before = AutoModelForCausalLM.from_pretrained(made / "policy")
    after = AutoModelForCausalLM.from_pretrained(out)
    moved = before.get_input_embeddings().weight - after.get_input_embeddings().weight
    assert moved.abs().max() > 1e-4
    assert not (tmp_path / "it1.work").exists()
    manifest = json.loads((out / "turnwise.json").read_text())
    assert manifest["stage"] == "refuel"
    assert manifest["counts"] == {"train": 11, "test": 4}


def test_the_first_loss_of_a_whole_batch_is_eta_squared_times_the_squared_gap(
    made: Path, tmp_path: Path
) -> None:
    config = refuel_config(
        made, tmp_path / "out", per_device_train_batch_size=11, total_episodes=11
    )

    refuel.main(config)

    (step,) = [line for line in trainables.metrics(tmp_path / "out") if "loss" in line]
    assert step["loss"] == pytest.approx(4 * np.mean(squared_gaps(made, "train")), rel=1e-5)


def test_the_same_command_twice_verifies_and_a_different_one_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = refuel_config(made, tmp_path / "out", total_episodes=4)
    refuel.main(config)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()

    refuel.main(config)

    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(DataError, match=r"config\.lr"):
        refuel.main(dataclasses.replace(config, lr=2e-3))


def test_a_cluster_tag_is_filled_by_one_run_and_read_by_the_next(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = trainables.pairs_repo(tmp_path / "pairs", train=6)
    logprobs.main(
        logprobs.Config(
            base_model=str(made / "policy"), query_dataset=pairs, cluster="h100", temperature=0.8
        )
    )
    assert f"old log-probs of {pairs} are in {pairs}_h100" in capsys.readouterr().out
    AcceleratorState._reset_state(True)

    task = refuel.Task(query_dataset=pairs, cluster="h100")
    refuel.main(refuel_config(made, tmp_path / "out", task=task, total_episodes=6))

    assert f"old log-probs: reused from {pairs}_h100" in capsys.readouterr().out


def test_pairs_longer_than_total_length_are_left_out_and_counted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = store.open_repo(str(made / "pairs")).table("train").to_pylist()
    longest = [max(len(row[f"{s}_token"]) for s in ("chosen", "reject")) - 1 for row in rows]
    limit = sorted(longest)[4]
    kept = sum(n <= limit for n in longest)
    task = refuel.Task(query_dataset=str(made / "pairs"), total_length=limit)

    refuel.main(refuel_config(made, tmp_path / "out", task=task, total_episodes=4))

    said = capsys.readouterr().out
    assert f"{11 - kept} of 11 pairs are longer than {limit} ids" in said
    counts = json.loads((tmp_path / "out" / "turnwise.json").read_text())["counts"]
    assert counts["train"] == kept


def test_more_processes_than_are_active_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--num_processes is 2, 1 process\(es\) are active"):
        refuel.main(refuel_config(made, tmp_path / "out", num_processes=2))


def test_gradient_checkpointing_changes_memory_and_nothing_else(made: Path, tmp_path: Path) -> None:
    losses = []
    for name, on in (("plain", False), ("recomputed", True)):
        refuel.main(refuel_config(made, tmp_path / name, gradient_checkpointing=on))
        AcceleratorState._reset_state(True)
        lines = trainables.metrics(tmp_path / name)
        losses.append([line["loss"] for line in lines if "loss" in line])

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains_float32_masters_and_saves_bf16(made: Path, tmp_path: Path) -> None:
    refuel.main(refuel_config(made, tmp_path / "out", dtype="bf16"))

    lines = trainables.metrics(tmp_path / "out")
    assert lines[0]["val_loss"] == pytest.approx(4 * np.mean(squared_gaps(made, "test")), rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_precision_that_is_active_decides_and_not_the_flag(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refuel_config(made, tmp_path / "out", total_episodes=4)
    refuel.main(config)

    refuel.main(dataclasses.replace(config, dtype="fp32"))  # what auto meant: finished already

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(DataError, match=r'config\.precision: "fp32" -> "bf16"'):
        refuel.main(config)


def test_an_update_of_other_examples_is_another_run_however_they_are_dealt(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refuel_config(made, tmp_path / "out", total_episodes=4)
    refuel.main(config)

    refuel.main(
        dataclasses.replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    )

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"config\.examples_per_update: 4 -> 8"):
        refuel.main(config)


def test_flags_of_the_seed_are_read_under_their_names() -> None:
    argv = (
        "--task.query_dataset org/pairs --task.cluster c --task.total_length 1024 "
        "--task.temperature 0.7 --lr 3e-7 --rebel.eta 1e3 --warmup_ratio 0.1 "
        "--total_episodes 64000 --output_dir ./o --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 16 --per_device_eval_batch_size 1 "
        "--print_sample_output_freq 100 --base_model ./m --eps 1e-7 --weight_decay 1e-5 "
        "--seed 7 --optimizer adam"
    )

    config = parse(refuel.Config, argv.split(), aliases={"--rebel.": "--refuel."})

    assert config.refuel.eta == 1000.0
    assert (config.task.total_length, config.task.temperature) == (1024, 0.7)
    assert (config.optimizer, config.seed, config.eps) == ("adam", 7, 1e-7)


def test_every_problem_of_a_config_is_said_at_once() -> None:
    wrong: dict[str, Any] = {"warmup_ratio": 1.0, "per_device_train_batch_size": 0}
    wrong |= {"total_episodes": 0, "keep_checkpoints": 0, "save_every_updates": -1}
    with pytest.raises(DataError) as caught:
        refuel.Config(**wrong)

    for part in (
        "--base_model is missing",
        "--output_dir is missing",
        "--task.query_dataset is missing",
        "--warmup_ratio 1.0: at least 0 and less than 1",
        "--per_device_train_batch_size 0: at least 1",
        "--keep_checkpoints 0: at least 1",
        "--save_every_updates -1: at least 0",
        "--total_episodes 0: at least 1",
    ):
        assert part in str(caught.value)


def test_sft_lowers_the_mean_nll_of_its_rollouts(made: Path, tmp_path: Path) -> None:
    config = sft.Config(
        base_model=str(made / "policy"),
        output_dir=str(tmp_path / "out"),
        dataset=str(made / "groups"),
        lr=1e-2,
        num_epochs=8,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
    )

    sft.main(config)

    losses = [line["loss"] for line in trainables.metrics(tmp_path / "out")]
    assert len(losses) == 16
    assert losses[0] == pytest.approx(np.log(280), abs=0.3)  # an untrained policy knows nothing
    assert losses[-1] < losses[0] - 1.5


def test_sft_refuses_pairs(made: Path, tmp_path: Path) -> None:
    config = sft.Config(
        base_model=str(made / "policy"),
        output_dir=str(tmp_path / "out"),
        dataset=str(made / "pairs"),
    )
    with pytest.raises(DataError, match=r"'token' .*tokenize_masks"):
        sft.main(config)
