"""generate under kill -9, lost servers, torn journals and Ctrl-C: nothing lost, nothing twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.journal import read_journal
from pipeline.models import write_folder
from pipeline.store import open_repo, read_rollouts
from tests.playing import tiny_policy, tiny_tokenizer

ROOT = Path(__file__).parents[1]
STAGE = str(ROOT / "stages" / "generate.py")
SERVER = str(ROOT / "bench" / "_simulated_server.py")
GAME = ["--environment", "guessing_game", "--dataset", "guessing_game"]
# A player that takes its time, so that there is a moment to kill it in.
SLOW_PLAYER = """
import time
from pipeline.environments.guessing_game import random_player

def play(messages, draw):
    time.sleep(0.002)
    return random_player(messages, draw)
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "policy"
    tokenizer = tiny_tokenizer()
    model = tiny_policy(tokenizer)
    write_folder(model, model.state_dict(), tokenizer, folder, torch.float32)
    (folder.parent / "slow_player.py").write_text(SLOW_PLAYER)
    return str(folder)


def environment(policy: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(Path(policy).parent)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def kill(policy: str, lives: dict[Path, list[dict[str, float]]], *flags: object) -> list[dict]:
    """Run the stage once for each output, killed at each of its moments, then to its end.

    Returns what became of each run that was to be killed.
    """
    moments = json.dumps({str(out): moments for out, moments in lives.items()})
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), moments, "--model", policy]
    done = subprocess.run(
        [*command, *map(str, flags)],
        env=environment(policy),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ended"')]
    assert len(runs) == sum(len(moments) + 1 for moments in lives.values())
    return runs


def start(policy: str, out: Path, *flags: object) -> subprocess.Popen:
    command = [sys.executable, STAGE, "--model", policy, "--output_repo", out, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(policy),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    return stderr


def shards(repo: Path) -> list[str]:
    manifest = json.loads((repo / "turnwise.json").read_text())
    return [entry["sha256"] for entry in manifest["files"]]


def wait_for_lines(out: Path, lines: int, process: subprocess.Popen) -> None:
    journal = out / ".turnwise" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.005)


SCRIPTED = ["--engine", "scripted", "--script", "slow_player:play", "--num_data", "100"]
HF = ["--engine", "hf", "--max_batch_rows", "1", "--maxlen", "6", "--num_data", "60"]


@pytest.mark.parametrize("flags", [SCRIPTED, HF], ids=["scripted", "hf"])
def test_twenty_kills_at_any_moment_change_no_byte(policy, tmp_path, flags):
    """Five of them while it starts. Nothing that was finished is played again (killing.py)."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    flags = [*GAME, *flags, "--concurrency", "8"]
    starting = [{"after_s": 0.02 * n} for n in range(5)]
    moments = [*starting, *[{"lines": 1 + n % 9} for n in range(16)]]
    told = kill(policy, {whole: [], torn: moments}, *flags)
    assert sum(run["ended"] == -9 for run in told) >= 20
    assert shards(torn) == shards(whole)
    assert not (torn / ".turnwise").exists()


def test_with_batches_what_was_finished_before_a_kill_is_kept_bit_for_bit(policy, tmp_path):
    out, kept = tmp_path / "out", []
    flags = [*GAME, "--num_data", "40", "--maxlen", "6", "--concurrency", "16"]
    for lines in (5, 30, 55):
        stage = start(policy, out, *flags)
        wait_for_lines(out, lines, stage)
        stage.kill()
        stage.communicate()
        kept = list(read_journal(out / ".turnwise" / "journal.jsonl"))
        assert lines <= len(kept) < 80
    finish(start(policy, out, *flags))
    rollouts = {r.key: r for r in read_rollouts(open_repo(str(out)))}
    assert len(rollouts) == 80
    for record in kept:
        turns = rollouts[record["prompt_id"], record["sample"]].turns
        assert [t.response_ids for t in turns] == [t["response_ids"] for t in record["turns"]]
        assert [t.logprobs for t in turns] == [
            pytest.approx(t["logprobs"], rel=1e-6) for t in record["turns"]
        ]


def test_a_kill_at_any_step_of_writing_the_repo_changes_no_byte(policy, tmp_path):
    """Before each file that is moved, forced to disk or deleted, until none is left."""
    flags = [*GAME, *SCRIPTED, "--num_data", "2"]
    whole, calls = tmp_path / "whole", range(1, 26)
    lives = {whole: [], **{tmp_path / str(call): [{"call": call}] for call in calls}}
    told = kill(policy, lives, *flags)
    killed = [Path(run["out"]) for run in told if run["ended"] == -9]
    assert 8 <= len(killed) < len(calls), "every step was tried, and the last ones are no more"
    for call in calls:
        assert shards(tmp_path / str(call)) == shards(whole), call
        assert not (tmp_path / str(call) / ".turnwise").exists(), call


@pytest.mark.slow
def test_a_journal_torn_at_every_byte_of_its_last_line_changes_no_byte(policy, tmp_path):
    flags = [*GAME, *SCRIPTED, "--num_data", "2", "--num_turns", "1"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    kill(policy, {whole: []}, *flags)
    stage = [sys.executable, "-c", TEAR, torn, "--model", policy, "--output_repo", torn, *flags]
    done = subprocess.run(
        list(map(str, stage)),
        env=environment(policy),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cut"')]
    assert [run["cut"] for run in seen] == list(range(1, len(seen) + 1))
    assert len(seen) > 300
    assert {tuple(run["sha256"]) for run in seen} == {tuple(shards(whole))}


# Kills the stage just before it writes its shards, and plays from there once for each byte less.
TEAR = """
import json, os, shutil, signal, sys
from pathlib import Path
from tests import killing
from pipeline.config import parse
from stages import generate

out = Path(sys.argv[1])
sys.argv = ["stages/generate.py", *sys.argv[2:]]

def play(fatal):
    child = os.fork()
    if child == 0:
        if fatal:
            from pipeline import store
            store.write_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        generate.main(parse(generate.Config))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

killing.warm_up()
assert play(fatal=True) == -9
journal = (out / ".turnwise" / "journal.jsonl").read_bytes()
last = len(journal.splitlines(keepends=True)[-1])
kept = out.with_name("kept")
shutil.copytree(out, kept)
for cut in range(1, last + 1):
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    (out / ".turnwise" / "journal.jsonl").write_bytes(journal[:-cut])
    sys.stdout.flush()
    assert play(fatal=False) == 0, cut
    files = json.loads((out / "turnwise.json").read_text())["files"]
    print(json.dumps({"cut": cut, "sha256": [file["sha256"] for file in files]}), flush=True)
"""


class FakeServer:
    """The simulated server as a process on one port, to be killed and started again."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags
        self.port = "0"
        self.url = ""
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, SERVER, "--model", "policy", "--port", self.port, *self.flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = self.url.rpartition(":")[2]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def fake_server(*flags: str) -> Iterator[FakeServer]:
    server = FakeServer("--length-median=8", "--ids-to=300", *flags)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def served(server: FakeServer, *more: object) -> list[object]:
    return [*GAME, "--engine", "vllm", "--maxlen", 12, "--policy_url", server.url, *more]


@pytest.mark.slow
def test_a_server_killed_twenty_times_costs_nothing(policy, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    jitter = random.Random(5)
    with fake_server("--step-ms=3", "--slots=4") as server:
        flags = served(server, "--num_data", 150, "--concurrency", 16, "--retries", 12)
        finish(start(policy, whole, *flags))
        stage = start(policy, torn, *flags)
        for kills in range(20):
            wait_for_lines(torn, 12 * kills + 3, stage)
            time.sleep(jitter.uniform(0, 0.1))
            server.kill()
            time.sleep(jitter.uniform(0, 0.3))
            server.start()
        finish(stage)
    assert shards(torn) == shards(whole)


def test_a_server_that_stays_away_leaves_failed_rollouts_that_go_on_later(policy, tmp_path):
    """The stage stops at the share that may fail; run again, it plays on what had failed."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with fake_server("--step-ms=3", "--slots=4") as server:
        flags = served(server, "--num_data", 25, "--concurrency", 16, "--retries", 1)
        finish(start(policy, whole, *flags))
        stage = start(policy, torn, *flags, "--max_failed_share", 0.1)
        wait_for_lines(torn, 10, stage)
        server.kill()
        told = finish(stage, code=2)
        assert "of 50 rollouts failed" in told and server.url in told
        assert "Traceback" not in told
        records = list(read_journal(torn / ".turnwise" / "journal.jsonl"))
        failed = [record for record in records if record["status"] == "failed"]
        assert {record["end_reason"] for record in failed} == {"server_lost"}
        assert any(record["turns"] for record in failed)
        assert not (torn / "turnwise.json").exists()
        server.start()
        finish(start(policy, torn, *flags))
    assert shards(torn) == shards(whole)


def test_when_one_of_two_servers_dies_the_other_plays_everything(policy, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    speed = ("--step-ms=3", "--slots=4")
    with fake_server(*speed) as one, fake_server(*speed) as other:
        flags = served(one, other.url, "--num_data", 25, "--concurrency", 16)
        finish(start(policy, whole, *flags))
        stage = start(policy, torn, *flags)
        wait_for_lines(torn, 10, stage)
        one.kill()
        assert "50 of 50 dialogues · 0 in flight · 0 failed" in finish(stage)
    assert shards(torn) == shards(whole)


def test_few_failures_are_kept_as_rows_and_counted(policy, tmp_path):
    """A server that refuses some contexts (they are too long for it) fails those rollouts alone."""
    out = tmp_path / "out"
    with fake_server("--max-model-len=60") as server:
        flags = served(server, "--num_data", 30, "--retries", 0)
        finish(start(policy, out, *flags, "--max_failed_share", 1))
    rollouts = list(read_rollouts(open_repo(str(out))))
    ended = [r for r in rollouts if r.end_reason == "context_full"]
    assert ended and all(r.status == "ended_early" for r in ended)
    assert len({r.key for r in rollouts}) == len(rollouts)


@pytest.mark.parametrize("flags", [SCRIPTED, HF, ["--engine", "vllm"]], ids=lambda f: f[1])
def test_ctrl_c_stops_within_five_seconds_and_resumes(policy, tmp_path, flags):
    out = tmp_path / "out"
    with fake_server("--step-ms=10", "--slots=2") as server:
        flags = [*GAME, *flags, "--num_data", 15]
        flags += ["--policy_url", server.url, "--maxlen", 12] if "vllm" in flags else []
        stage = start(policy, out, *flags)
        wait_for_lines(out, 2, stage)
        began = time.monotonic()
        stage.send_signal(signal.SIGINT)
        told = finish(stage, code=130)
        assert time.monotonic() - began < 5
        assert "run the same command again" in told and "Traceback" not in told
        kept = list(read_journal(out / ".turnwise" / "journal.jsonl"))
        finish(start(policy, out, *flags))
    rollouts = {r.key for r in read_rollouts(open_repo(str(out)))}
    assert len(rollouts) == 30 and {(r["prompt_id"], r["sample"]) for r in kept} <= rollouts


def server_processes(stage: subprocess.Popen) -> list[psutil.Process]:
    """Return the servers that the stage's guards watch."""
    guards = psutil.Process(stage.pid).children()
    return [server for guard in guards for server in guard.children()]


@pytest.mark.slow
def test_real_servers_end_with_ctrl_c_and_are_started_again_when_killed(
    policy: Any, tmp_path: Path
) -> None:
    from vllm_fixtures import save_tiny_llama

    model, out = save_tiny_llama(tmp_path / "policy", 512), tmp_path / "out"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    flags = [
        *(*GAME, "--engine", "vllm", "--num_data", 200, "--maxlen", 40, "--concurrency", 8),
        *("--server_args=--enforce-eager", "--dtype", "float32", "--retries", 2),
    ]
    stage = start(str(model), out, *flags)
    wait_for_lines(out, 5, stage)
    servers = server_processes(stage)
    began = time.monotonic()
    stage.send_signal(signal.SIGINT)
    assert "run the same command again" in finish(stage, code=130)
    assert time.monotonic() - began < 5
    assert len(servers) == 1 and not servers[0].is_running()

    stage = start(str(model), out, *flags)
    kept: list[dict] = []
    for lines in (20, 80, 160):
        wait_for_lines(out, lines, stage)
        [server] = server_processes(stage)
        server.kill()
        kept = list(read_journal(out / ".turnwise" / "journal.jsonl"))
    told = finish(stage)
    assert told.count("exited with code 137") == 3, told
    rollouts = {r.key: r for r in read_rollouts(open_repo(str(out)))}
    assert len(rollouts) == 400
    assert {r.status for r in rollouts.values()} == {"complete"}
    for record in kept:
        turns = rollouts[record["prompt_id"], record["sample"]].turns
        assert [t.response_ids for t in turns] == [t["response_ids"] for t in record["turns"]]
    shutil.rmtree(out)
