"""rank with --engine vllm, as a user types it, against servers that run already."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.journal import read_journal
from pipeline.records import ROLLOUTS, Rollout
from pipeline.repos import open_repo
from pipeline.rows import rollout_row
from pipeline.scoring import windows
from pooling_fixtures import NAME, dialogue, fake_pooling, own_ids, pooled, value_of
from reward_models import one_thread, write_classifier  # noqa: F401
from stages.rank import Config, main
from vllm_fixtures import Answer, FakeVllm

ROOT = Path(__file__).resolve().parent.parent


def rollouts(prompts: int) -> list[Rollout]:
    return [dialogue(1 + n % 3, f"p{n:03d}", sample) for n in range(prompts) for sample in (0, 1)]


def write_repo(folder: Path, rows: list[Rollout]) -> Path:
    (folder / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([rollout_row(row) for row in rows], schema=ROLLOUTS)
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repo(tmp_path_factory.mktemp("prompts") / "rollouts", rollouts(80))


def rank_here(prompts: Path, model: Path, output: Path, *urls: str) -> None:
    main(Config(str(prompts), str(model), str(output), turns="all", engine="vllm", reward_url=urls))


def start(
    prompts: Path, model: Path, output: Path, *flags: str, **env: str
) -> subprocess.Popen[str]:
    """Run the stage in a process of its own."""
    command = [sys.executable, str(ROOT / "stages" / "rank.py"), "--engine", "vllm"]
    command += ["--prompts", str(prompts), "--reward_model", str(model), "--turns", "all"]
    return subprocess.Popen(
        [*command, "--output_repo", str(output), *flags],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


@contextmanager
def stalling(model: Path, after: int) -> Iterator[tuple[FakeVllm, threading.Event]]:
    """Score the first chunks, so many, and nothing of the others until the event is set."""
    free = threading.Event()
    chunks = [chunk for window in windows(rollouts(80), "train") for chunk in window]
    late = {last_ids(model, one) for chunk in chunks[after:] for one in chunk.rollouts}

    def answer(body: dict[str, Any]) -> Answer:
        if tuple(body["input"][-1]) in late and not free.is_set():
            free.wait(120)
            return 0, None, {}  # whoever asked is gone
        return pooled(body)

    with fake_pooling(answer) as fake:
        try:
            yield fake, free
        finally:
            free.set()


def last_ids(model: Path, rollout: Rollout) -> tuple[int, ...]:
    """Return the ids of a whole dialogue."""
    return tuple(own_ids(model, rollout, rollout.score_turn))


def until_journalled(output: Path, chunks: int) -> list[dict[str, Any]]:
    """Wait until so many chunks are on disk."""
    journal, deadline = output / ".turnwise" / "journal-00000.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= chunks):
        assert time.monotonic() < deadline, "a chunk wasn't scored"
        time.sleep(0.02)
    return list(read_journal(journal))


def test_scores_are_the_servers_whichever_answers(
    prompts: Path, model: Path, tmp_path: Path
) -> None:
    with fake_pooling() as one, fake_pooling() as two:
        rank_here(prompts, model, tmp_path / "one", one.url)
        assert not two.bodies
        rank_here(prompts, model, tmp_path / "two", one.url, two.url)
        asked = [len(fake.bodies) for fake in (one, two)]
        assert min(asked) > 30
        # Where the servers are is no part of what the repo is: it is finished.
        rank_here(prompts, model, tmp_path / "two", two.url)
        assert [len(fake.bodies) for fake in (one, two)] == asked
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    for row, rollout in zip(
        open_repo(str(tmp_path / "one")).table("train").to_pylist(), rollouts(80), strict=True
    ):
        assert (row["prompt_id"], row["sample"]) == (rollout.prompt_id, rollout.sample)
        turns = range(len(rollout.turns or []))
        assert row["rewards"] == [value_of(own_ids(model, rollout, turn)) for turn in turns]
    with pytest.raises(DataError, match=r"config\.engine"):
        main(Config(str(prompts), str(model), str(tmp_path / "two"), turns="all"))


def test_a_kill_costs_nothing_that_was_finished(prompts: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    with stalling(model, after=2) as (fake, free):
        stage = start(prompts, model, output, "--reward_url", fake.url)
        records = until_journalled(output, 2)
        stage.kill()
        stage.communicate()
        done = {row for record in records for row in record["rows"]}
        free.set()
        before = len(fake.bodies)
        rank_here(prompts, model, output, fake.url)
        asked = [tuple(body["input"][-1]) for body in fake.bodies[before:]]
        rank_here(prompts, model, tmp_path / "whole", fake.url)
    assert shards(output) == shards(tmp_path / "whole")
    again = [row for row, one in enumerate(rollouts(80)) if last_ids(model, one) in asked]
    assert len(done) == 64
    assert again == [row for row in range(160) if row not in done]


def test_ctrl_c_ends_within_seconds_while_a_server_hangs(
    prompts: Path, model: Path, tmp_path: Path
) -> None:
    with stalling(model, after=1) as (fake, _):
        stage = start(prompts, model, tmp_path / "out", "--reward_url", fake.url)
        until_journalled(tmp_path / "out", 1)
        began = time.monotonic()
        stage.send_signal(signal.SIGINT)
        said, _ = stage.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert stage.returncode == 130
    assert said.endswith("interrupted: run the same command again to go on where it stopped\n")
    assert "Traceback" not in said


def test_a_server_that_is_lost_is_a_line_without_the_key(
    prompts: Path, model: Path, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        # Its probes are answered: only dialogues of the repo have so many prefixes.
        return (
            (503, {"error": "sk-hidden is over"}, {}) if len(body["input"]) == 3 else pooled(body)
        )

    with fake_pooling(answer) as fake:
        flags = ("--reward_url", fake.url, "--retries", "0", "--reward_api_key_env", "MY_KEY")
        stage = start(prompts, model, tmp_path / "out", *flags, MY_KEY="sk-hidden")
        said, _ = stage.communicate(timeout=120)
    assert stage.returncode == 2
    assert "Traceback" not in said
    assert "sk-hidden" not in said
    assert f"error: {model} gave no score for prompt_id 'p0" in said
    assert not (tmp_path / "out" / "turnwise.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"reward_url": ("http://127.0.0.1:9",)}, "--reward_url needs --engine vllm"),
        (
            {"engine": "vllm", "reward_model": "rule:length"},
            "rule:length is no model: leave out --engine vllm",
        ),
        ({"engine": "vllm", "keep_objectives": True}, "which no server can score"),
        ({"engine": "vllm", "retries": -1}, "--retries -1: at least 0"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Config(prompts="./in", output_repo="./out", **flags)


def test_several_processes_would_start_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="--engine vllm under 2 processes: run one, and give"):
        Config(prompts="./in", output_repo="./out", engine="vllm")
