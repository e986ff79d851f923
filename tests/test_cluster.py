"""Log-probs from before training: exact, resumed, reused under one key only, guarded by a gate."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline import cluster, logprob_keys, logprob_rows, store
from pipeline.balance import Budget
from pipeline.errors import DataError
from pipeline.logprob_rows import Scorer
from pipeline.logprobs import MaskedLogprobs
from pipeline.sources import open_source
from pipeline.start import LoadConfig
from tests import multiturn, trainables


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def scorer(seed: int = 5) -> Scorer:
    accelerator = Accelerator(cpu=True)
    policy = accelerator.prepare(MaskedLogprobs(trainables.tiny_model(seed=seed), 0.8))
    return Scorer(accelerator, policy, Budget(256))


def place(name: str, turns: str = "mask") -> logprob_keys.Place:
    return logprob_keys.cluster_place(open_source(name, turns), "c")


def asked(
    column: str = "old_logprob", model: str = "f1", temperature: float = 0.8, turns: str = "mask"
) -> logprob_keys.Wanted:
    config = LoadConfig(dtype="fp32")
    key = logprob_keys.key_of(trainables.tokenizer(), model, turns, temperature, config)
    return logprob_keys.Wanted(column, key, "./policy")


def fill(name: str, seed: int = 5, **changes: Any) -> store.Repo:
    """Fill a column by the policy of a seed."""
    where = place(name, changes.get("turns", "mask"))
    return cluster.fill(scorer(seed), where, asked(**{**changes, "turns": where.source.turns}))


def numbers(repo: store.Repo, column: str = "old_logprob", split: str = "train") -> np.ndarray:
    """Return all numbers of a column, one after the other."""
    names = [name for name in repo.columns() if name.endswith(column)]
    return np.concatenate([row[n] for row in repo.table(split).to_pylist() for n in names])


def expected(seed: int, row: dict[str, Any], side: str) -> list[float]:
    """Compute the log-probs of a row's masked ids in float64, one sequence at a time."""
    ids = torch.tensor(row[f"{side}token"])
    logits = trainables.tiny_model(seed=seed)(ids[None]).logits[0, :-1]
    logps = torch.log_softmax(logits.double() / 0.8, -1).gather(-1, ids[1:, None])[:, 0]
    return logps[torch.tensor(row[f"{side}mask"][1:], dtype=torch.bool)].tolist()


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return trainables.pairs_repo(tmp_path / "pairs", train=9, test=3)


def test_every_masked_id_of_every_split_gets_the_models_log_prob(pairs: str) -> None:
    repo = fill(pairs)

    assert repo.name == pairs + "_c"
    for split, count in (("train", 9), ("test", 3)):
        rows = repo.table(split).to_pylist()
        assert len(rows) == count
        for row in rows:
            for side in ("chosen_", "reject_"):
                found = row[f"{side}old_logprob"]
                assert found == pytest.approx(expected(5, row, side), abs=1e-5)
    inputs = store.open_repo(pairs).table("train").to_pylist()
    names = inputs[0].keys()
    assert [{k: row[k] for k in names} for row in repo.table("train").to_pylist()] == inputs


def test_groups_get_log_probs_for_each_rollout(tmp_path: Path) -> None:
    name = multiturn.groups_repo(tmp_path / "groups", (3, 1, 4))

    repo = fill(name, column="ref_logprob")

    rows = repo.table().to_pylist()
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        *(("g0", k) for k in range(3)),
        ("g1", 0),
        *(("g2", k) for k in range(4)),
    ]
    for row in rows:
        assert row["ref_logprob"] == pytest.approx(expected(5, row, ""), abs=1e-5)


def test_the_same_key_is_reused(pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = fill(pairs)
    capsys.readouterr()

    again = fill(pairs)

    assert again.content_hash == first.content_hash
    assert capsys.readouterr().out == f"old log-probs: reused from {pairs}_c\n"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"temperature": 1.0}, "temperature: 0.8 -> 1.0"),
        ({"model": "f2"}, 'model: "f1" -> "f2"'),
    ],
)
def test_another_key_is_computed_anew_in_the_same_place(
    pairs: str, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], reason: str
) -> None:
    first = fill(pairs)
    before = numbers(first)

    other = fill(pairs, seed=6, **changed)

    assert f"old log-probs: computed anew, because of {reason}\n" in capsys.readouterr().out
    assert other.path == first.path
    assert np.abs(numbers(other) - before).max() > 1e-2
    assert sorted(p.name for p in Path(pairs).parent.iterdir()) == ["pairs", "pairs_c"]


def test_other_pairs_are_scored_anew(
    tmp_path: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(pairs)
    shutil.rmtree(pairs)
    trainables.pairs_repo(tmp_path / "pairs", train=4, seed=1)

    repo = fill(pairs)

    assert "old log-probs: computed anew, because of inputs: " in capsys.readouterr().out
    assert repo.num_rows() == 4


def test_asking_for_the_reference_keeps_the_old_log_probs(
    pairs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = numbers(fill(pairs))
    capsys.readouterr()

    both = fill(pairs, seed=6, column="ref_logprob", model="f2")

    assert "computed anew" not in capsys.readouterr().out
    assert numbers(both, "old_logprob").tolist() == old.tolist()
    row = both.table("test").to_pylist()[0]
    assert row["chosen_ref_logprob"] == pytest.approx(expected(6, row, "chosen_"), abs=1e-5)
    assert row["chosen_old_logprob"] == pytest.approx(expected(5, row, "chosen_"), abs=1e-5)
    assert both.manifest is not None
    assert {role: m["fingerprint"] for role, m in both.manifest["models"].items()} == {
        "base_model": "f1",
        "ref_model": "f2",
    }
    # Now a later policy: its column is replaced, the reference's is not touched.
    monkeypatch.setattr(cluster, "drifted", lambda *_: pytest.fail("nothing is reused"))
    later = fill(pairs, seed=7, model="f3")
    assert numbers(later, "ref_logprob").tolist() == numbers(both, "ref_logprob").tolist()
    assert np.abs(numbers(later) - old).max() > 1e-2
    assert [name for name in later.columns() if "logprob" in name and "sample" not in name] == [
        "chosen_ref_logprob",
        "reject_ref_logprob",
        "chosen_old_logprob",
        "reject_old_logprob",
    ]


def test_other_turns_are_scored_anew_and_the_repo_holds_their_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = multiturn.pairs_repo(tmp_path / "pairs", "last")
    fill(name)
    capsys.readouterr()

    repo = fill(name, column="ref_logprob", turns="all")

    said = capsys.readouterr().out
    assert "computed anew, because of other turns that train: mask -> all\n" in said
    assert not any(column.endswith("old_logprob") for column in repo.columns())
    for i, row in enumerate(repo.table().to_pylist()):
        spans = multiturn.pair(i, "all").reject.sequence.spans
        assert sum(row["reject_mask"]) == sum(span.end - span.start for span in spans)
        assert row["reject_ref_logprob"] == pytest.approx(expected(5, row, "reject_"), abs=1e-5)


def test_log_probs_that_the_pairs_bring_along_are_not_taken_for_ours(
    tmp_path: Path, pairs: str
) -> None:
    first = fill(pairs, seed=6, column="ref_logprob")
    shutil.copytree(first.path, tmp_path / "copied")

    repo = fill(str(tmp_path / "copied"))

    assert not any(column.endswith("ref_logprob") for column in repo.columns())
    assert numbers(repo).tolist() == numbers(fill(pairs)).tolist()


def test_numbers_that_drifted_are_computed_anew(
    pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The key can't tell: the fingerprint is given, and the weights are others.
    fill(pairs, seed=6)

    repo = fill(pairs, seed=5)

    assert "computed anew, because of a drift of" in capsys.readouterr().out
    row = repo.table("train").to_pylist()[0]
    assert row["chosen_old_logprob"] == pytest.approx(expected(5, row, "chosen_"), abs=1e-5)


@pytest.mark.parametrize(("shift", "reused"), [(np.log(1.04), True), (np.log(1.06), False)])
def test_the_gate_is_at_a_mean_ratio_of_1_05(
    pairs: str, capsys: pytest.CaptureFixture[str], shift: float, reused: bool
) -> None:
    fill(pairs)
    real = logprob_rows.logprobs

    def shifted(who: Scorer, examples: Any) -> Any:
        for i, found in real(who, examples):
            yield i, {role: values + np.float32(shift) for role, values in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "logprobs", shifted)
        fill(pairs)

    assert ("reused from" in capsys.readouterr().out) == reused


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_a_killed_run_goes_on_from_its_journals(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    if kind == "pairs":
        trainables.pairs_repo(made, train=9, test=3)
    else:
        multiturn.groups_repo(made, (2,) * 12)
    shutil.copytree(made, tmp_path / "whole")
    whole = fill(str(tmp_path / "whole"))
    monkeypatch.setattr(logprob_rows, "BLOCK", 4)
    scored: list[str] = []

    def counting(who: Scorer, examples: Any) -> Any:
        for i, found in real(who, examples):
            if len(scored) == 6:
                raise KeyboardInterrupt
            scored.append(examples[i].prompt_id)
            yield i, found

    real = logprob_rows.logprobs
    monkeypatch.setattr(logprob_rows, "logprobs", counting)
    with pytest.raises(KeyboardInterrupt):
        fill(str(made))
    assert len(scored) == 6
    first, scored[:] = list(scored), [""] * 7
    AcceleratorState._reset_state(True)

    repo = fill(str(made))

    assert len(scored) - 7 == 12 - 6
    assert not set(first) & set(scored[7:])
    for split in repo.splits():
        assert np.allclose(numbers(repo, split=split), numbers(whole, split=split), atol=1e-6)


def test_a_kill_between_the_two_moves_of_a_repo_loses_nothing(
    pairs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pairs)

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == "pairs_c":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(cluster.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(pairs, column="ref_logprob")
    assert not Path(pairs + "_c").exists()
    AcceleratorState._reset_state(True)
    capsys.readouterr()

    repo = fill(pairs, column="ref_logprob")

    assert capsys.readouterr().out == f"reference log-probs: reused from {pairs}_c\n"
    assert numbers(repo, "old_logprob").tolist() == numbers(repo, "ref_logprob").tolist()


def test_a_half_made_cache_of_another_key_is_no_obstacle(pairs: str) -> None:
    building = Path(pairs + "_c.new") / ".turnwise"
    building.mkdir(parents=True)
    state = {"config_hash": "0", "identity": {}, "stage": "logprobs", "date": "", "started": ""}
    (building / "run.json").write_text(json.dumps(state))

    assert fill(pairs).num_rows() == 9


def test_a_half_made_cache_that_is_being_written_is_left_alone(pairs: str) -> None:
    import subprocess
    import sys

    work = Path(pairs + "_c.new") / ".turnwise"
    work.mkdir(parents=True)
    state = {"config_hash": "0", "identity": {}, "stage": "logprobs", "date": "", "started": ""}
    (work / "run.json").write_text(json.dumps(state))
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(work / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match=r"another process is writing .* with other keys"):
            fill(pairs)
        other.communicate(b"")
    assert (work / "run.json").exists()


def test_a_repo_that_is_no_cache_is_never_replaced(tmp_path: Path, pairs: str) -> None:
    trainables.pairs_repo(tmp_path / "pairs_c")
    with pytest.raises(DataError, match="kind 'pairs', no cache"):
        fill(pairs)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, pairs: str) -> None:
    (tmp_path / "pairs_c").mkdir()
    (tmp_path / "pairs_c" / "thesis.txt").write_text("words")
    with pytest.raises(DataError, match="holds something else"):
        fill(pairs)
    assert (tmp_path / "pairs_c" / "thesis.txt").read_text() == "words"


def test_ids_that_the_model_has_no_embedding_for_are_named(tmp_path: Path) -> None:
    pair = multiturn.pair(3, "all")
    pair.chosen.sequence.ids[0] = 280
    name = multiturn.write(tmp_path / "pairs", "pairs", {"train": [pair]})

    with pytest.raises(DataError, match=r"prompt p003 holds ids from \d+ to 280.* has 280"):
        fill(name)


def test_ids_behind_the_last_trained_one_are_never_read(tmp_path: Path) -> None:
    pair = multiturn.pair(3, "forked")
    sequence = pair.chosen.sequence
    sequence.ids = np.append(sequence.ids, [multiturn.PAD] * 5).astype(np.int32)
    sequence.mask = np.append(sequence.mask, [0] * 5).astype(np.uint8)
    sequence.segments[0].length += 5
    repo = fill(multiturn.write(tmp_path / "pairs", "pairs", {"train": [pair]}))

    alone = fill(multiturn.write(tmp_path / "p", "pairs", {"train": [multiturn.pair(3, "forked")]}))
    assert numbers(repo).tolist() == pytest.approx(numbers(alone).tolist(), abs=1e-6)


def test_published_pairs_are_scored_as_pairs_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tie = multiturn.published_row([7], [8]) | {"chosen_reward": 0.25}
    rows = [multiturn.published_row([20, 21, 9], [20, 22]), tie, multiturn.published_row([5], [6])]
    name = multiturn.published_repo(tmp_path / "published", rows)

    repo = fill(name)

    assert "1 rows are left out (tie: 1)" in capsys.readouterr().out
    first, second = repo.table().to_pylist()
    assert first["chosen_token"] == [1, 2, 3, 20, 21, 9]
    assert first["reject_mask"] == [0, 0, 0, 1, 1]
    assert second["chosen_token"] == [1, 2, 3, 5]
    assert first["chosen_old_logprob"] == pytest.approx(expected(5, first, "chosen_"), abs=1e-5)
    assert "chosen_logprob" not in repo.columns()
    # A second column is added to the rows that are there, and what was left out stays told.
    both = fill(name, seed=6, column="ref_logprob", model="f2")
    assert both.manifest is not None
    assert both.manifest["dropped"] == {"tie": 1}
    assert both.num_rows() == 2
