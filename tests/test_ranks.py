"""Processes that share rows: a dead one is told, a slow or a late one is waited for."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline import ranks
from pipeline.errors import EngineError
from pipeline.journal import Journal
from pipeline.scoring import Records


def hold(work: Path, number: int, ready: Path) -> None:
    """Be a process that holds its lock until it is killed."""
    os.environ["RANK"] = str(number)
    with ranks.holding(work.parent, work, 2):
        ready.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path):
    """Start a process that holds the lock of rank 1."""
    work = tmp_path / "work"
    work.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=hold, args=(work, 1, tmp_path / "ready")
    )
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_process_that_dies_is_told_within_seconds(tmp_path: Path, holder) -> None:
    began = time.monotonic()
    threading.Timer(0.5, lambda: os.kill(holder.pid, signal.SIGKILL)).start()
    with pytest.raises(EngineError, match=r"process of rank 1 ended.* 3 units of its share"):
        ranks.wait(tmp_path / "work", lambda: {1: 3}, began, set())
    assert 0.5 < time.monotonic() - began < 20


def test_a_process_that_died_while_this_one_scored_is_told_at_once(
    tmp_path: Path, holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with ranks.holding(tmp_path, tmp_path / "work", 2) as share:
        deadline = time.monotonic() + 20
        while share.seen != {1}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        holder.kill()
        holder.join()
    began = time.monotonic()
    with pytest.raises(EngineError, match="process of rank 1 ended"):
        ranks.wait(tmp_path / "work", lambda: {1: 3}, began, share.seen)
    assert time.monotonic() - began < 20


def test_a_process_that_is_alive_is_waited_for(tmp_path: Path, holder) -> None:
    began = time.monotonic()

    def missing() -> dict[int, int]:
        return {1: 1} if time.monotonic() < began + 1 else {}

    ranks.wait(tmp_path / "work", missing, began, set(), patience_s=0.1)
    assert time.monotonic() - began >= 1


def test_a_process_that_never_starts_is_told_after_a_while(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match="rank 2 ended, or never began"):
        ranks.wait(tmp_path, lambda: {2: 1}, began, set(), patience_s=0.3)
    assert time.monotonic() - began >= 0.3
    # Patience counts from this process's own start: hours of scoring are patience enough.
    began = time.monotonic()
    with pytest.raises(EngineError):
        ranks.wait(tmp_path, lambda: {2: 1}, began - 1000, set())
    assert time.monotonic() - began < 5


def test_a_journal_that_grows_is_a_sign_of_life_where_no_lock_is_seen(tmp_path: Path) -> None:
    began = time.monotonic()

    def missing() -> dict[int, int]:
        left = 8 - int((time.monotonic() - began) / 0.15)
        return {1: left} if left > 0 else {}

    ranks.wait(tmp_path, missing, began, set(), patience_s=0.6)
    assert time.monotonic() - began > 0.9


def test_a_late_process_leaves_nothing_in_a_finished_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "turnwise.json").write_text("{}")
    with ranks.holding(tmp_path, tmp_path / ".turnwise", 2) as share:
        assert share.unfinished is False
    assert not (tmp_path / ".turnwise").exists()


def test_an_earlier_process_of_the_same_rank_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    earlier = FileLock(tmp_path / "lock-00001", thread_local=False)
    earlier.acquire()
    began = time.monotonic()
    threading.Timer(0.5, earlier.release).start()
    with ranks.holding(tmp_path / "output", tmp_path, 2) as share:
        assert share.unfinished is True
        assert time.monotonic() - began >= 0.4


def test_journals_are_read_once_as_they_grow(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "journal-00000.jsonl"), None
    records = Records(tmp_path)
    chunks = {"train": 3, "test": 2}
    assert records.missing(chunks, 2) == Counter({0: 3, 1: 2})
    first.append({"chunk": "train/0", "scores": [{"a": 0}]})
    assert records.missing(chunks, 2) == Counter({0: 2, 1: 2})
    second = Journal(tmp_path / "journal-00001.jsonl")
    second.append({"chunk": "train/1", "scores": [{"a": 1}]})
    first.append({"chunk": "test/0", "scores": [{"a": 2}]})
    first.append({"chunk": "train/2", "scores": [{"a": 3}]})
    with (tmp_path / "journal-00001.jsonl").open("ab") as torn:
        torn.write(b'{"chunk": "test/1"')
    assert records.missing(chunks, 2) == Counter({1: 1})
    with (tmp_path / "journal-00001.jsonl").open("ab") as torn:
        torn.write(b', "scores": [{"a": 4}]}\n')
    assert records.missing(chunks, 2) == Counter()
    # In any order, whoever scored them: a run of other processes may have left them anywhere.
    taken = [records.take(key) for key in ("train/2", "test/1", "train/0", "test/0", "train/1")]
    assert taken == [[{"a": n}] for n in (3, 4, 0, 2, 1)]
