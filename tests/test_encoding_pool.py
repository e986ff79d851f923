"""Processes that encode text: the same bytes however many, and nobody waits for a dead one."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import store
from pipeline.encoding_pool import EncodingPool, Template, _cuts
from pipeline.errors import DataError, EngineError, RowError
from stages.tokenize_masks import Config, main
from templates import make_tokenizer

ROOT = Path(__file__).parents[1]
DATE = "2024-12-24"


def said(answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gemma")
    make_tokenizer("gemma").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pool(model: str) -> Iterator[EncodingPool]:
    with closing(EncodingPool(Template(model, DATE), 2)) as opened:
        yield opened


def plain(outcomes: list[Any]) -> list[Any]:
    return [
        (entry.reason, entry.detail) if isinstance(entry, RowError) else entry for entry in outcomes
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_outcomes_are_those_of_one_process(count: int, pool: EncodingPool, model: str) -> None:
    texts = ["Hello.", "Grüße 🙂 \ue000", "<eos>", "", "x" * 3000, "16"]
    dialogues: list[Any] = [(said(texts[i % 6] + str(i)), None) for i in range(count)]
    if count == 50:
        system = {"role": "system", "content": "no"}
        dialogues[7] = ([system, *said("refused")], None)
        dialogues[8] = (said("two halves \ud83d\ude42"), None)
        dialogues[9] = (said("tools"), "{")
    found = plain(pool.encode_dialogues(dialogues))
    assert found == plain(Template(model, DATE).load().encode_dialogues(dialogues))
    reasons = [entry[0] for entry in found if isinstance(entry[0], str)]
    expected = ["template_error", "not_unicode", "tools_unreadable"] if count == 50 else []
    assert reasons == expected


def test_slices_cover_every_dialogue_once() -> None:
    for lengths in ([1], [1, 1], [9, 1, 1], [1, 1, 9], [0, 0, 0, 0], list(range(40))):
        dialogues: list[Any] = [([{"content": "x" * n}], None) for n in lengths]
        for parts in (1, 2, 3, 8):
            cuts = _cuts(dialogues, parts)
            assert [i for start, end in cuts for i in range(start, end)] == [*range(len(lengths))]
            assert len(cuts) <= parts and all(start < end for start, end in cuts)
    sizes = [end - start for start, end in _cuts([([{"content": "x"}], None)] * 9, 3)]
    assert sizes == [3, 3, 3]


def test_a_killed_process_is_named(model: str) -> None:
    before = set(multiprocessing.active_children())
    with closing(EncodingPool(Template(model, DATE), 2)) as pool:
        worker = pool._workers[1][0]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        named = rf"process 2 of the 2 .*pid {worker.pid}\) was killed by signal 9"
        with pytest.raises(EngineError, match=named):
            pool.encode_dialogues([(said(str(i)), None) for i in range(4)])
    assert set(multiprocessing.active_children()) == before


def test_what_one_process_cannot_load_is_said(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        EncodingPool(Template(str(tmp_path / "nothing"), DATE), 2)
    with pytest.raises(DataError, match="can't be named tools"):
        EncodingPool(Template(model, DATE, variables='{"tools": 1}'), 1)


def write(folder: Path, rows: int) -> str:
    names = ("chosen", "rejected")
    pairs = [{name: said(f"{name} {i} " * (i % 40 + 1)) for name in names} for i in range(rows)]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(pairs), folder / "train.parquet")
    return str(folder)


def test_the_stage_writes_the_same_bytes_with_any_number(tmp_path: Path, model: str) -> None:
    source, before = write(tmp_path / "source", 60), set(multiprocessing.active_children())
    hashes = []
    for processes in (1, 2, 3):
        output = str(tmp_path / f"out{processes}")
        main(
            Config(
                input_repo=source,
                output_repo=output,
                tokenizer=model,
                num_proc=processes,
                test_size=5,
            )
        )
        hashes.append(store.open_repo(output).content_hash)
    assert len(set(hashes)) == 1
    assert set(multiprocessing.active_children()) == before


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("what", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_processes_end_with_the_stage(
    what: signal.Signals, code: int, tmp_path: Path, model: str
) -> None:
    command = [sys.executable, str(ROOT / "stages" / "tokenize_masks.py"), "--num_proc", "2"]
    command += ["--input_repo", write(tmp_path / "source", 30_000), "--tokenizer", model]
    command += ["--output_repo", str(tmp_path / "out")]
    stage = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    spool, deadline = tmp_path / "out" / ".turnwise" / "selected.arrow", time.monotonic() + 120
    while not spool.exists() or spool.stat().st_size < 10_000:
        assert stage.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = children_of(stage.pid)
    assert len(workers) >= 2
    os.killpg(stage.pid, what) if what == signal.SIGINT else os.kill(stage.pid, what)
    _, told = stage.communicate(timeout=60)
    assert stage.returncode == code
    assert "Traceback" not in told
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
