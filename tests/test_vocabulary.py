"""The vocabulary's size is found where a folder tells it, and is unknown otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import store
from pipeline.errors import DataError
from pipeline.vocabulary import vocabulary_of
from small_repos import Config, table


def model(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def lineage(folder: Path, policy: str) -> store.Repo:
    """Write rollouts that this policy played, and what rank made of them."""
    played = store.begin("generate", "rollouts", Config(), str(folder / "rollouts"))
    played.claim.job.models["model"] = {"name": policy, "fingerprint": "f"}
    rollouts = played.write({"train": table(2)}, counts={})
    inputs = {"inputs": [rollouts]}
    ranked = store.begin("rank", "ranked", Config(), str(folder / "ranked"), **inputs)
    return ranked.write({"train": table(2)}, counts={})


def test_the_policy_that_played_the_rollouts_tells_it(tmp_path: Path) -> None:
    policy = model(tmp_path / "policy", vocab_size=128256)
    assert vocabulary_of("", lineage(tmp_path, policy)) == 128256


def test_a_tokenizer_that_is_named_goes_first(tmp_path: Path) -> None:
    policy = model(tmp_path / "policy", vocab_size=128256)
    other = model(tmp_path / "other", text_config={"vocab_size": 262144})
    assert vocabulary_of(other, lineage(tmp_path, policy)) == 262144


def test_a_policy_that_is_elsewhere_tells_nothing(tmp_path: Path) -> None:
    assert vocabulary_of("", lineage(tmp_path, "meta-llama/Meta-Llama-3-8B-Instruct")) == 0


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    Path(folder, "config.json").write_text("[]")
    with pytest.raises(DataError, match=r"config\.json is no model's configuration"):
        vocabulary_of(folder, lineage(tmp_path, folder))
