"""stages/logprobs.py as a user runs it: two models, two processes, killed on the way."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForCausalLM

from pipeline import logprob_keys, reference, store
from pipeline.config import parse
from pipeline.errors import DataError
from pipeline.preferences import PairConfig, Task
from pipeline.sources import open_pairs
from stages import logprobs as stage
from tests import multiturn, trainables

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    trainables.policy_folder(folder / "policy")
    trainables.policy_folder(folder / "other", seed=7)
    return folder


def assert_exact(repo: store.Repo, column: str, model: Path, temperature: float = 0.8) -> None:
    """Compare every number of a column with a whole model's, one sequence at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for split in repo.splits():
        for row in repo.table(split).to_pylist():
            for side in ("chosen_", "reject_") if "chosen_token" in row else ("",):
                ids = torch.tensor(row[f"{side}token"])
                with torch.no_grad():
                    logits = loaded(ids[None]).logits[0, :-1].double() / temperature
                logps = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]
                expected = logps[torch.tensor(row[f"{side}mask"][1:], dtype=torch.bool)]
                assert row[f"{side}{column}"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_policy_and_a_reference_in_one_run(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = multiturn.pairs_repo(tmp_path / "pairs", "all")
    config = stage.Config(
        base_model=str(models / "policy"),
        ref_model=str(models / "other"),
        query_dataset=pairs,
        cluster="c",
        turns="forked",
    )

    stage.main(config)

    said = capsys.readouterr().out
    assert f"old log-probs of {pairs} are in {pairs}_c\n" in said
    assert f"reference log-probs of {pairs} are in {pairs}_c\n" in said
    repo = store.open_repo(pairs + "_c")
    assert_exact(repo, "old_logprob", models / "policy")
    assert_exact(repo, "ref_logprob", models / "other")
    masks = [sum(row["chosen_mask"]) for row in repo.table("train").to_pylist()]
    spans = [multiturn.pair(i, "all").chosen.sequence.spans[1] for i in range(6)]
    assert masks == [span.end - span.start for span in spans]
    assert repo.manifest is not None
    assert {role: model["name"] for role, model in repo.manifest["models"].items()} == {
        "base_model": str(models / "policy"),
        "ref_model": str(models / "other"),
    }
    AcceleratorState._reset_state(True)

    stage.main(config)

    said = capsys.readouterr().out
    assert f"old log-probs: reused from {pairs}_c" in said
    assert f"reference log-probs: reused from {pairs}_c" in said


def test_groups(models: Path, tmp_path: Path) -> None:
    groups = multiturn.groups_repo(tmp_path / "groups")

    stage.main(stage.Config(ref_model=str(models / "other"), query_dataset=groups, cluster="c"))

    repo = store.open_repo(groups + "_c")
    assert repo.num_rows() == 8
    assert_exact(repo, "ref_logprob", models / "other")


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(DataError) as caught:
        stage.Config(temperature=0.0)
    for part in (
        "--query_dataset is missing",
        "--cluster is missing",
        "--base_model (old log-probs) and --ref_model: one at least is missing",
        "--temperature 0.0: greater than 0",
    ):
        assert part in str(caught.value)


def sharded() -> Any:
    """Stand for an accelerator that shards; it would load no second model."""
    return SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))


def test_two_models_under_a_strategy_that_shards_are_refused() -> None:
    with pytest.raises(DataError, match="DEEPSPEED prepares one model in a process"):
        reference.refuse_two_models(sharded())


def test_the_command_that_makes_reference_log_probs_makes_those_that_are_wanted(
    models: Path, tmp_path: Path
) -> None:
    pairs = multiturn.pairs_repo(tmp_path / "pairs", "last")
    config = PairConfig(
        base_model=str(models / "policy"),
        dtype="fp32",
        task=Task(query_dataset=pairs, cluster="c", temperature=0.7),
    )
    place = logprob_keys.cluster_place(open_pairs(pairs, "all"), "c")
    ref_model = str(models / "other")
    wanted = (config, ref_model, store.fingerprint_model(ref_model), sharded(), place)
    with pytest.raises(DataError, match="must be there first") as caught:
        reference.reference_logprobs(*wanted)

    (line,) = (line for line in str(caught.value).splitlines() if "stages/logprobs.py" in line)
    stage.main(parse(stage.Config, shlex.split(line)[3:]))

    assert_exact(reference.reference_logprobs(*wanted), "ref_logprob", models / "other", 0.7)
    hotter = replace(config, task=replace(config.task, temperature=0.9))
    with pytest.raises(DataError, match=r"--temperature 0\.9"):
        reference.reference_logprobs(hotter, *wanted[1:])


def begin_two(command: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start both ranks of a run as a launcher would."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    known = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_"))}
    known |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "stages" / "logprobs.py"), *command],
            env={**known, "RANK": rank, "LOCAL_RANK": rank},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]


def rows_of(journal: Path) -> list[int]:
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line)["row"] for line in lines]


def test_two_killed_processes_shared_the_rows_and_another_does_the_rest(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = trainables.pairs_repo(tmp_path / "pairs", train=400)
    command = ["--query_dataset", pairs, "--cluster", "c", "--base_model", str(models / "policy")]
    command += ["--max_tokens_per_microbatch", "64", "--packing", "none"]
    journals = [tmp_path / "pairs_c.new" / ".turnwise" / f"journal-0000{r}.jsonl" for r in (0, 1)]
    ranks = begin_two(command, tmp_path)
    deadline = time.monotonic() + 120
    while min(len(rows_of(journal)) for journal in journals) < 10:
        assert time.monotonic() < deadline, "two processes score within two minutes"
        assert [rank.poll() for rank in ranks] == [None, None]
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    done = [row for journal in journals for row in rows_of(journal)]
    assert len(set(done)) == len(done)
    assert len(done) < 400, "they were killed on their way"

    stage.main(parse(stage.Config, command))

    assert "going on with what was begun at" in capsys.readouterr().out
    repo = store.open_repo(pairs + "_c")
    assert repo.num_rows() == 400
    assert_exact(repo, "old_logprob", models / "policy")
