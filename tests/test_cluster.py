"""Old log-probs: computed once, exact, resumed, reused under one key only, guarded by a gate."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline import cluster, store
from pipeline.balance import Budget
from pipeline.errors import DataError
from pipeline.logprobs import MaskedLogprobs
from tests import trainables


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def scorer(seed: int = 5) -> cluster.Scorer:
    accelerator = Accelerator(cpu=True)
    policy = accelerator.prepare(MaskedLogprobs(trainables.tiny_model(seed=seed), 0.8))
    return cluster.Scorer(accelerator, policy, Budget(256))


def place(pairs: str, temperature: float = 0.8, fingerprint: str = "f1") -> cluster.Place:
    key = cluster.key_of(trainables.tokenizer(), temperature, "fp32", "sdpa")
    repo = store.open_repo(pairs)
    return cluster.cluster_place(pairs, "c", repo, key, ("./policy", fingerprint))


def old(repo: store.Repo, split: str = "train") -> list[np.ndarray]:
    rows = repo.table(split).to_pylist()
    return [np.array(row[f"{side}_old_logprob"]) for row in rows for side in ("chosen", "reject")]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return trainables.pairs_repo(tmp_path / "pairs", train=9, test=3)


def test_every_masked_id_of_every_split_gets_the_models_log_prob(pairs: str) -> None:
    repo = cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))

    assert repo.name == pairs + "_c"
    model = trainables.tiny_model(seed=5)
    for split, count in (("train", 9), ("test", 3)):
        rows = repo.table(split).to_pylist()
        assert len(rows) == count
        for row in rows:
            for side in ("chosen", "reject"):
                ids = torch.tensor(row[f"{side}_token"])
                logps = torch.log_softmax(model(ids[None]).logits[0, :-1].double() / 0.8, -1)
                chosen = logps.gather(-1, ids[1:, None])[:, 0]
                kept = chosen[torch.tensor(row[f"{side}_mask"][1:], dtype=torch.bool)]
                assert row[f"{side}_old_logprob"] == pytest.approx(kept.tolist(), abs=1e-5)
    inputs = store.open_repo(pairs).table("train").to_pylist()
    names = inputs[0].keys()
    assert [{k: row[k] for k in names} for row in repo.table("train").to_pylist()] == inputs


def test_the_same_key_is_reused(pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))
    capsys.readouterr()

    again = cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))

    assert again.content_hash == first.content_hash
    assert capsys.readouterr().out == f"old log-probs: reused from {pairs}_c\n"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"temperature": 1.0}, "config.temperature: 0.8 -> 1.0"),
        ({"fingerprint": "f2"}, 'models.base_model: "f1" -> "f2"'),
    ],
)
def test_another_key_is_computed_anew_in_the_same_place(
    pairs: str, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], reason: str
) -> None:
    first = cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))
    before = np.concatenate(old(first))

    other = cluster.old_logprobs(scorer(seed=6), place(pairs, **changed), store.open_repo(pairs))

    assert f"computed anew, because of {reason}\n" in capsys.readouterr().out
    assert other.path == first.path
    assert np.abs(np.concatenate(old(other)) - before).max() > 1e-2
    assert sorted(p.name for p in Path(pairs).parent.iterdir()) == ["pairs", "pairs_c"]


def test_numbers_that_drifted_are_computed_anew(
    pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The key can't tell: the fingerprint is given, and the weights are others.
    cluster.old_logprobs(scorer(seed=6), place(pairs), store.open_repo(pairs))

    repo = cluster.old_logprobs(scorer(seed=5), place(pairs), store.open_repo(pairs))

    assert "computed anew, because of a drift of" in capsys.readouterr().out
    fresh = cluster.old_logprobs(
        scorer(seed=5), dataclasses.replace(place(pairs), folder=repo.path.parent / "other"), repo
    )
    assert np.allclose(np.concatenate(old(repo)), np.concatenate(old(fresh)), atol=1e-5)


def test_a_killed_run_goes_on_from_its_journals(
    pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = old(cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs)))
    elsewhere = dataclasses.replace(place(pairs), folder=Path(pairs).parent / "again")
    monkeypatch.setattr(cluster, "BLOCK", 4)
    scored: list[int] = []

    def counting(who: cluster.Scorer, examples: Any) -> Any:
        for i, found in real(who, examples):
            if len(scored) == 6:
                raise KeyboardInterrupt
            scored.append(i)
            yield i, found

    real = cluster.logprobs
    monkeypatch.setattr(cluster, "logprobs", counting)
    with pytest.raises(KeyboardInterrupt):
        cluster.old_logprobs(scorer(), elsewhere, store.open_repo(pairs))
    assert len(scored) == 6
    scored[:] = [-1] * 7
    AcceleratorState._reset_state(True)

    repo = cluster.old_logprobs(scorer(), elsewhere, store.open_repo(pairs))

    assert len(scored) - 7 == 12 - 6
    assert np.allclose(np.concatenate(old(repo)), np.concatenate(whole), atol=1e-6)


def test_a_half_made_cache_of_another_key_is_no_obstacle(pairs: str) -> None:
    building = Path(pairs + "_c.new") / ".turnwise"
    building.mkdir(parents=True)
    state = {"config_hash": "0", "identity": {}, "stage": "logprobs", "date": "", "started": ""}
    (building / "run.json").write_text(json.dumps(state))

    repo = cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))

    assert repo.num_rows() == 9


def test_a_repo_that_is_no_cache_is_never_replaced(tmp_path: Path, pairs: str) -> None:
    trainables.pairs_repo(tmp_path / "pairs_c")
    with pytest.raises(DataError, match="kind 'pairs', no cache"):
        cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, pairs: str) -> None:
    (tmp_path / "pairs_c").mkdir()
    (tmp_path / "pairs_c" / "thesis.txt").write_text("words")
    with pytest.raises(DataError, match="holds something else"):
        cluster.old_logprobs(scorer(), place(pairs), store.open_repo(pairs))
    assert (tmp_path / "pairs_c" / "thesis.txt").read_text() == "words"
