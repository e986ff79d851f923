"""rank under kill -9, with one process and with several: the same bytes, nothing scored twice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Message, Rollout, Turn
from test_rank import manifest, rank, shards, write_repo

ROOT = Path(__file__).parents[1]
REWARD = """
import os, time

def score(messages, info):
    time.sleep(float(os.environ["SLEEP_S"]))
    file = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{float(info['row'])}\\n".encode())
    os.close(file)
    return info["row"]
"""


def rollout(row: int) -> Rollout:
    messages = [
        Message(role="user", content="go"),
        Message(role="assistant", content="word " * (row * 7 % 23 + 1)),
    ]
    turns = [Turn(0, [1, 2], [3], [-0.5], "stop")]
    info = {"row": row + 1}
    return Rollout(
        f"p{row // 2:04d}", row % 2, messages, turns, 0, 0, "complete", "score_turn", info=info
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reward, 700 rollouts (22 chunks), 40 of them and 2 of them."""
    folder = tmp_path_factory.mktemp("rank")
    (folder / "reward.py").write_text(REWARD)
    for rows in (700, 40, 2):
        write_repo(folder / f"rollouts{rows}", [rollout(row) for row in range(rows)])
    return folder


def live(
    place: Path, rows: int, entries: list[dict[str, Any]], sleep_s: float = 0.0005
) -> list[dict[str, Any]]:
    """Run rank as killing_rank.py says; return what became of each run."""
    command = [sys.executable, str(ROOT / "tests" / "killing_rank.py"), json.dumps(entries)]
    command += ["--prompts", str(place / f"rollouts{rows}")]
    command += ["--reward_model", f"python:{place / 'reward.py'}:score"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths, "SLEEP_S": str(sleep_s), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ended"')]
    return [run | {"stderr": done.stderr} for run in runs]


def entry(out: Path, lives: list[dict[str, Any]]) -> dict[str, Any]:
    return {"out": str(out), "calls": f"{out}.calls", "lives": [*lives]}


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[int, dict[str, bytes]]:
    """The shards of runs that nobody disturbed, by their number of rows."""
    found = {}
    for rows in (700, 40, 2):
        live(place, rows, [entry(place / f"whole{rows}", [{"world": 1}])])
        found[rows] = shards(place / f"whole{rows}")
    return found


def test_twelve_kills_at_any_moment_change_no_byte(place: Path, whole, tmp_path: Path) -> None:
    """Four of them while it starts; 22 chunks are no multiple of 3 processes."""
    moments = [{"after_s": 0.03 * n} for n in range(4)] + [{"lines": 1 + n % 3} for n in range(8)]
    entries = []
    for world in (1, 2, 3):
        lives = [{"world": world, "moment": moment} for moment in moments]
        entries.append(entry(tmp_path / f"torn{world}", [*lives, {"world": world}]))
    told = live(place, 700, entries)
    for world in (1, 2, 3):
        out = tmp_path / f"torn{world}"
        mine = [run["ended"] for run in told if run["out"] == str(out)]
        assert sum(-9 in ended for ended in mine) >= 10
        assert shards(out) == whole[700], world
        assert not (out / ".turnwise").exists()


def test_the_number_of_processes_may_change_between_runs(
    place: Path, whole, tmp_path: Path
) -> None:
    lives = [{"world": n, "moment": {"lines": 4}} for n in (2, 3, 1, 5)] + [{"world": 2}]
    told = live(place, 700, [entry(tmp_path / "torn", lives)])
    assert sum(-9 in run["ended"] for run in told) >= 3
    assert shards(tmp_path / "torn") == whole[700]


def test_more_processes_than_chunks(place: Path, whole, tmp_path: Path) -> None:
    live(place, 40, [entry(tmp_path / "many", [{"world": 5}])])
    assert shards(tmp_path / "many") == whole[40]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "README.md",
        "data",
        "pictures",
        "turnwise.json",
    ]


def test_a_kill_at_a_step_of_writing_the_repo_changes_no_byte(
    place: Path, whole, tmp_path: Path
) -> None:
    assert _killed_at(range(3, 15, 3), place, tmp_path, whole[40]) == 4


@pytest.mark.slow
def test_a_kill_at_any_step_of_writing_the_repo_changes_no_byte(
    place: Path, whole, tmp_path: Path
) -> None:
    """Before each file that is moved, forced to disk or deleted, until none is left."""
    assert 15 <= _killed_at(range(1, 41), place, tmp_path, whole[40]) < 40


def _killed_at(calls: range, place: Path, tmp_path: Path, expected: dict[str, bytes]) -> int:
    """Kill a run at each of these calls; return how many were killed."""
    entries = [
        entry(tmp_path / str(n), [{"world": 1, "moment": {"call": n}}, {"world": 1}]) for n in calls
    ]
    told = live(place, 40, entries)
    for n in calls:
        assert shards(tmp_path / str(n)) == expected, n
        assert not (tmp_path / str(n) / ".turnwise").exists(), n
    return sum(run["ended"] == [-9] for run in told)


def test_a_dead_process_stops_the_one_that_waits_and_a_rerun_goes_on(
    place: Path, whole, tmp_path: Path
) -> None:
    """Rank 1 is killed; rank 0 says so, with the command, instead of waiting for ever."""
    out, flags = tmp_path / "out", ("--reward_model", f"python:{place / 'reward.py'}:score")
    killed = entry(out, [{"world": 2, "moment": {"lines": 4, "last": True}}])
    [run] = live(place, 700, [killed], sleep_s=0.005)
    assert run["ended"] == [2, -9]
    assert "the process of rank 1 ended, or never began" in run["stderr"]
    assert "run the same command again, on every rank: " in run["stderr"]
    alone = live(place, 700, [entry(out, [{"world": 1}])])
    assert alone[-1]["ended"] == [0]
    assert shards(out) == whole[700]
    again = rank(place / "rollouts700", out, *flags)
    assert "finished already" in again.stdout
    assert manifest(out)["counts"]["scores"] == 700


def test_a_journal_torn_at_any_byte_of_its_last_line_changes_no_byte(
    place: Path, whole, tmp_path: Path
) -> None:
    _torn(place, tmp_path, whole[2], step=40)


@pytest.mark.slow
def test_a_journal_torn_at_every_byte_of_its_last_line_changes_no_byte(
    place: Path, whole, tmp_path: Path
) -> None:
    _torn(place, tmp_path, whole[2], step=1)


def _torn(place: Path, tmp_path: Path, expected: dict[str, bytes], step: int) -> None:
    first = entry(tmp_path / "first", [{"world": 1, "moment": {"call": 4}}])
    live(place, 2, [first])
    journal = tmp_path / "first" / ".turnwise" / "journal-00000.jsonl"
    whole_line = journal.read_bytes()
    assert whole_line.count(b"\n") == 1 and len(whole_line) > 100
    cuts = range(1, len(whole_line) + 1, step)
    entries = []
    for cut in cuts:
        out = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "first", out)
        (out / ".turnwise" / "journal-00000.jsonl").write_bytes(whole_line[:-cut])
        entries.append(entry(out, [{"world": 1}]))
    live(place, 2, entries)
    assert all(shards(tmp_path / f"cut{cut}") == expected for cut in cuts)
