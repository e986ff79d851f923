"""DPO as a user runs it: pairs, a policy and perhaps a reference in, a policy folder out."""

import dataclasses
import gc
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM

from pipeline import reference, store
from pipeline.columns import PAIR_SIDES
from pipeline.config import parse
from pipeline.errors import DataError
from pipeline.preferences import Task
from stages import dpo as stage
from stages import logprobs as logprobs_stage
from tests import multiturn, trainables


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    trainables.policy_folder(folder / "policy")
    trainables.policy_folder(folder / "other", seed=7)
    multiturn.pairs_repo(folder / "pairs", "all", train=9, test=3)
    multiturn.pairs_repo(folder / "forked", "forked", train=5, test=0)
    return folder


def config_of(made: Path, out: Path, pairs: str = "pairs", **changes: Any) -> stage.Config:
    config = stage.Config(
        base_model=str(made / "policy"),
        output_dir=str(out),
        task=Task(query_dataset=str(made / pairs)),
        dpo=stage.Dpo(beta=0.5),
        lr=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        total_episodes=18,
        print_sample_output_freq=3,
    )
    return dataclasses.replace(config, **changes)


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in trainables.metrics(folder) if "loss" in line]


def checks(folder: Path) -> list[dict[str, float]]:
    return [line for line in trainables.metrics(folder) if "val_loss" in line]


def test_a_run_begins_at_log_2_and_learns_what_was_preferred(made: Path, tmp_path: Path) -> None:
    stage.main(config_of(made, tmp_path / "it1", total_episodes=90))

    lines, held = steps(tmp_path / "it1"), checks(tmp_path / "it1")
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert held[0]["val_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[-1]["loss"] < 0.4
    assert lines[-1]["sign_align"] == 1.0
    assert lines[-1]["delta_chosen"] - lines[-1]["delta_reject"] > 1
    rows = store.open_repo(str(made / "pairs")).table("test").to_pylist()
    gaps = [row["chosen_reward"] - row["reject_reward"] for row in rows]
    assert held[0]["val_reward_gap"] == pytest.approx(np.mean(gaps))
    before = AutoModelForCausalLM.from_pretrained(made / "policy")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "it1")
    moved = before.get_input_embeddings().weight - after.get_input_embeddings().weight
    assert moved.abs().max() > 1e-4
    manifest = json.loads((tmp_path / "it1" / "turnwise.json").read_text())
    assert (manifest["stage"], manifest["counts"]) == ("dpo", {"train": 9, "test": 3})
    fingerprints = {model["fingerprint"] for model in manifest["models"].values()}
    assert fingerprints == {store.fingerprint_model(str(made / "policy"))}


def test_the_first_loss_with_a_margin_is_that_of_the_rewards(made: Path, tmp_path: Path) -> None:
    settings = stage.Dpo(beta=0.5, label_smoothing=0.1, reward_margin=True)
    config = config_of(made, tmp_path / "out", dpo=settings, per_device_train_batch_size=9)

    stage.main(dataclasses.replace(config, total_episodes=9))

    rows = store.open_repo(str(made / "pairs")).table("train").to_pylist()
    x = -np.array([row["chosen_reward"] - row["reject_reward"] for row in rows])
    expected = np.mean(0.9 * np.log1p(np.exp(-x)) + 0.1 * np.log1p(np.exp(x)))
    (line,) = steps(tmp_path / "out")
    assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_all_turns_train_or_the_forked_one(made: Path, tmp_path: Path) -> None:
    """One update each: the pull on the chosen rollout's turns that train is different."""
    sums = {}
    for turns in ("all", "forked"):
        config = config_of(made, tmp_path / turns, turns=turns, total_episodes=9)
        stage.main(
            dataclasses.replace(config, task=dataclasses.replace(config.task, cluster=turns))
        )
        AcceleratorState._reset_state(True)
        repo = store.open_repo(str(made / f"pairs_{turns}"))
        sums[turns] = [sum(row["chosen_mask"]) for row in repo.table("train").to_pylist()]
        assert repo.manifest is not None
        key = repo.manifest["identity"]["config"]["columns"]["ref_logprob"]
        assert key["turns"] == {"all": "mask", "forked": "forked"}[turns]

    spans = [multiturn.pair(i, "all").chosen.sequence.spans for i in range(9)]
    assert sums["all"] == [sum(s.end - s.start for s in row) for row in spans]
    assert sums["forked"] == [row[1].end - row[1].start for row in spans]


def test_turns_inside_the_shared_prefix_train_alike_packed_or_not(
    made: Path, tmp_path: Path
) -> None:
    for packing in ("auto", "none"):
        stage.main(config_of(made, tmp_path / packing, packing=packing, lr=1e-2))
        AcceleratorState._reset_state(True)

    packed, apart = (steps(tmp_path / packing) for packing in ("auto", "none"))
    assert len(packed) == 6
    assert abs(packed[-1]["loss"] - packed[0]["loss"]) > 0.1
    for name in ("loss", "grad_norm", "delta_chosen"):
        assert [line[name] for line in packed] == pytest.approx(
            [line[name] for line in apart], rel=1e-3, abs=1e-5
        )


def test_all_turns_of_pairs_that_end_at_the_fork_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenize_masks.py .* --mask all"):
        stage.main(config_of(made, tmp_path / "out", pairs="forked"))

    stage.main(config_of(made, tmp_path / "out", pairs="forked", turns="forked"))
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_another_reference_scores_before_the_policy_is_loaded(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = multiturn.pairs_repo(tmp_path / "pairs", "all", train=4, test=0)
    task = Task(query_dataset=pairs, cluster="c")
    config = config_of(made, tmp_path / "out", task=task, ref_model=str(made / "other"))

    stage.main(dataclasses.replace(config, total_episodes=4))

    said = capsys.readouterr().out
    assert "reused" not in said
    policy, other = (AutoModelForCausalLM.from_pretrained(made / n) for n in ("policy", "other"))
    deltas = [
        [summed(policy, row, side) - summed(other, row, side) for side in PAIR_SIDES]
        for row in store.open_repo(pairs).table("train").to_pylist()
    ]
    (line,) = steps(tmp_path / "out")
    x = 0.5 * np.array([chosen - reject for chosen, reject in deltas])
    assert line["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-x))), rel=1e-4)
    assert line["delta_chosen"] == pytest.approx(np.mean([c for c, _ in deltas]), abs=1e-4)
    AcceleratorState._reset_state(True)

    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"), total_episodes=4)
    stage.main(again)

    assert f"reference log-probs: reused from {pairs}_c" in capsys.readouterr().out
    assert steps(tmp_path / "again")[0]["loss"] == line["loss"]


def summed(model: Any, row: dict[str, Any], side: str) -> float:
    """Return the summed log-prob of a side's masked ids under a whole model."""
    ids = torch.tensor(row[f"{side}_token"])
    with torch.no_grad():
        logps = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)
    chosen = logps.gather(-1, ids[1:, None])[:, 0]
    return float(chosen[torch.tensor(row[f"{side}_mask"][1:], dtype=torch.bool)].sum())


def test_the_reference_is_gone_before_the_policy_is_loaded(made: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    def alive() -> int:
        gc.collect()
        return sum(type(one) is LlamaForCausalLM for one in gc.get_objects())

    before, counts = alive(), []
    config = config_of(made, tmp_path / "out", ref_model=str(made / "other"))
    with pytest.MonkeyPatch.context() as patch:
        # Where the policy is loaded, to count and to stop.
        patch.setattr(reference, "prepare", lambda *_: counts.append(alive()) or sys.exit())
        with pytest.raises(SystemExit):
            stage.main(config)

    assert counts == [before]
    assert (tmp_path / "out.work" / "logprobs" / "turnwise.json").exists()


def test_a_reference_of_another_vocabulary_is_refused(made: Path, tmp_path: Path) -> None:
    from pipeline.models import untied, write_folder
    from pipeline.tiny import make_tokenizer

    model = trainables.tiny_model()
    tokenizer = make_tokenizer(["other words make other merges"], 270, 256)
    write_folder(
        model, untied(model, model.state_dict()), tokenizer, tmp_path / "alien", torch.float32
    )

    with pytest.raises(DataError, match="a reference needs the policy's vocabulary"):
        stage.main(config_of(made, tmp_path / "out", ref_model=str(tmp_path / "alien")))


def test_log_probs_of_logprobs_are_reused_by_dpo(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = multiturn.pairs_repo(tmp_path / "pairs", "all", train=4, test=0)
    logprobs_stage.main(
        logprobs_stage.Config(
            ref_model=str(made / "other"), query_dataset=pairs, cluster="c", temperature=1.0
        )
    )
    assert f"reference log-probs of {pairs} are in {pairs}_c" in capsys.readouterr().out
    AcceleratorState._reset_state(True)

    task = Task(query_dataset=pairs, cluster="c")
    stage.main(config_of(made, tmp_path / "out", task=task, ref_model=str(made / "other")))

    assert f"reference log-probs: reused from {pairs}_c" in capsys.readouterr().out


def test_a_published_dataset_trains_its_forked_turns(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [multiturn.published_row([10 + i, 21, 9], [20 + i, 22]) for i in range(5)]
    rows[2]["chosen_reward"] = rows[2]["reject_reward"]
    name = multiturn.published_repo(tmp_path / "published", rows)
    task = Task(query_dataset=name)

    stage.main(config_of(made, tmp_path / "out", task=task, turns="forked", total_episodes=4))

    assert "1 rows are left out (tie: 1)" in capsys.readouterr().out
    (line,) = steps(tmp_path / "out")
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-6)
    manifest = json.loads((tmp_path / "out" / "turnwise.json").read_text())
    assert manifest["counts"] == {"train": 4}


def test_flags_parse_and_every_problem_is_said_at_once() -> None:
    argv = (
        "--task.query_dataset org/pairs --task.cluster c --dpo.beta 0.05 --dpo.reward_margin "
        "--dpo.label_smoothing 0.1 --turns forked --ref_model org/ref --base_model ./m "
        "--output_dir ./o"
    )
    config = parse(stage.Config, argv.split())
    assert config.dpo == stage.Dpo(0.05, 0.1, True)
    assert (config.turns, config.ref_model) == ("forked", "org/ref")
    assert (config.lr, config.total_episodes, config.task.temperature) == (5e-7, 60000, 1.0)

    with pytest.raises(DataError) as caught:
        stage.Config(dpo=stage.Dpo(beta=0.0, label_smoothing=0.5))
    for part in (
        "--base_model is missing",
        "--task.query_dataset is missing",
        "--dpo.beta 0.0: greater than 0",
        "--dpo.label_smoothing 0.5: from 0 to below 0.5",
    ):
        assert part in str(caught.value)
