import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import store
from pipeline.config import execution
from pipeline.errors import DataError
from small_repos import (
    Config,
    batches,
    rows,
    shard_hashes,
    table,
    write_rollouts,
)

ROOT = Path(__file__).resolve().parent.parent

# A stage of 30 rows in two splits that journals each row and kills itself where it is told.
STAGE = """
import os, signal, sys
import pyarrow as pa
from pipeline import store
from pipeline.records import ROLLOUTS
from small_repos import Config, rows

out, where = sys.argv[1:]

def die(here):
    if here == where:
        os.kill(os.getpid(), signal.SIGKILL)

def split(name, rows):
    yield pa.RecordBatch.from_pylist(rows, schema=ROLLOUTS)
    die(name)

def dropped():
    yield {"reason": "too_long"}
    die("shards")

run = store.begin("generate", "rollouts", Config(), out, seed=7)
journal = run.journal()
done = {r["prompt_id"] for r in journal.records()}
print("kept", len(done))
for number, row in enumerate(rows(30)):
    if row["prompt_id"] not in done:
        journal.append(row)
    if number == 10:
        die("journal")
journal.close()
kept = sorted(run.journals(), key=lambda row: row["prompt_id"])
splits = {"train": split("train", kept[:20]), "test": split("test", kept[20:])}
run.write(splits, dropped=dropped(), counts={"prompts": 30})
"""


def run_stage(out, where=""):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", STAGE, str(out), where]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_stage(out).returncode == 0
    return shard_hashes(out)


@pytest.mark.parametrize(
    ("where", "kept"), [("journal", 11), ("train", 30), ("test", 30), ("shards", 30)]
)
def test_a_stage_killed_anywhere_resumes_to_the_same_bytes(tmp_path, undisturbed, where, kept):
    out = tmp_path / "out"
    killed = run_stage(out, where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "turnwise.json").exists()
    resumed = run_stage(out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"kept {kept}\n" in resumed.stdout
    assert shard_hashes(out) == undisturbed
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "data",
        "dropped.jsonl",
        "turnwise.json",
    ]
    repo = store.open_repo(str(out))
    assert [r.key for r in store.read_rollouts(repo)] == [(f"p{i:04d}", i % 2) for i in range(20)]


def test_a_repo_is_card_shards_and_manifest(tmp_path):
    options = {"dropped": [{"reason": "b"}, {"reason": "a"}, {"reason": "a", "row": 1}]}
    repo = write_rollouts(tmp_path / "out", 5, extra={"note": [1]}, **options)
    manifest = json.loads((tmp_path / "out" / "turnwise.json").read_text())
    assert repo.manifest == manifest
    assert manifest["stage"] == "generate"
    assert manifest["seed"] == 7
    assert manifest["splits"] == {"train": 5}
    assert manifest["counts"] == {"prompts": 5, "rows_out": 5}
    assert manifest["dropped"] == {"a": 2, "b": 1}
    assert list(manifest["dropped"]) == ["a", "b"]
    assert manifest["extra"] == {"note": [1]}
    assert [(f["path"], f["rows"]) for f in manifest["files"]] == [
        ("data/train-00000-of-00001.parquet", 5)
    ]
    assert manifest["date"] == manifest["timings"]["started"][:10]
    lines = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["b", "a", "a"]


def test_lineage_names_the_parent_and_its_content(tmp_path):
    parent = write_rollouts(tmp_path / "parent")
    run = store.begin(
        "rank", "ranked", Config(), str(tmp_path / "out"), inputs=[parent], models={"rm": "f00"}
    )
    manifest = run.write({"train": table(2)}, counts={}).manifest
    assert manifest["inputs"] == [
        {
            "name": str(tmp_path / "parent"),
            "revision": None,
            "content_hash": parent.content_hash,
            "stage": "generate",
        }
    ]
    assert manifest["models"] == {"rm": {"name": None, "fingerprint": "f00"}}


def test_a_finished_repo_is_verified_and_left_alone(tmp_path, capsys):
    write_rollouts(tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    # An execution field doesn't change what is written.
    config = Config(policy_url="http://elsewhere:1", output_repo="./other")
    run = store.begin("generate", "rollouts", config, str(tmp_path / "out"), seed=7)
    assert run.finished
    assert "is finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert run.repo().num_rows() == 5


def test_a_finished_repo_that_changed_is_not_passed_off_as_finished(tmp_path):
    write_rollouts(tmp_path / "out")
    next((tmp_path / "out" / "data").iterdir()).write_bytes(b"x")
    with pytest.raises(DataError, match=r"changed after it was finished.*rm -r"):
        store.begin("generate", "rollouts", Config(), str(tmp_path / "out"), seed=7)


def test_two_processes_cannot_write_one_output(tmp_path):
    out = tmp_path / "out"
    run = store.begin("generate", "rollouts", Config(), str(out), seed=7)
    other = run_stage(out)
    assert other.returncode == 1
    assert "another process is writing" in other.stderr
    # The same process may come back, as after an exception in a notebook.
    assert not store.begin("generate", "rollouts", Config(), str(out), seed=7).finished
    run.write({"train": table(1)}, counts={})
    finished = run_stage(out)
    assert "is finished already" in finished.stdout


def test_a_stage_without_a_row_left_says_why_and_keeps_the_dropped_rows(tmp_path):
    run = store.begin("tokenize_masks", "pairs", Config(), str(tmp_path / "out"))
    drops = [{"reason": "too_long", "prompt_id": "p1"}, {"reason": "tie"}, {"reason": "tie"}]
    with pytest.raises(DataError) as caught:
        run.write({"train": table(0)}, dropped=drops, counts={"rollouts": 6})
    kept = run.work / "dropped.jsonl"
    assert "tokenize_masks has no row left to write" in str(caught.value)
    assert "(rollouts: 6)" in str(caught.value)
    assert "tie: 2, too_long: 1" in str(caught.value)
    assert str(kept) in str(caught.value)
    assert [json.loads(line) for line in kept.read_text().splitlines()] == drops
    assert not (tmp_path / "out" / "turnwise.json").exists()
    assert not (tmp_path / "out" / "data").exists()


def test_dropped_rows_may_be_found_while_the_splits_are_read(tmp_path):
    dropped = []

    def split():
        for batch in batches(table(4), 2):
            dropped.append({"reason": "tie"})
            yield batch

    run = store.begin("generate", "rollouts", Config(), str(tmp_path / "out"))
    repo = run.write({"train": split()}, dropped=dropped, counts={})
    assert repo.manifest["dropped"] == {"tie": 2}


@dataclass(frozen=True)
class Secretive:
    hub_token: str = "s3cret-in-a-field"
    note: str = "take hf_AbCdEfGhIjKl and run"
    api_key: str = execution("s3cret-in-execution")


def test_no_token_reaches_manifest_card_or_state(tmp_path, monkeypatch):
    secrets = ("s3cret", "hf_AbCdEf", "hf_FromTheCommand")
    monkeypatch.setattr("sys.argv", ["stages/x.py", "--hub_token", "s3cret-in-a-field"])
    monkeypatch.setenv("HF_TOKEN", "hf_FromTheCommand")
    run = store.begin("generate", "rollouts", Secretive(), str(tmp_path / "out"))
    state = (run.work / "run.json").read_text()
    leaky = rows(1)
    leaky[0]["messages"][0]["content"] = "my token is hf_AbCdEfGhIjKl"
    split = table(1).from_pylist(leaky, schema=table(1).schema)
    run.write(
        {"train": split},
        counts={},
        extra={"server": {"api_key": "s3cret-in-extra", "log": "hf_AbCdEfGhIjKl"}},
        card={"notes": ["hf_AbCdEfGhIjKl"]},
    )
    texts = [state, *((tmp_path / "out" / n).read_text() for n in ("README.md", "turnwise.json"))]
    assert [s for s in secrets for text in texts if s in text] == []
    assert "[redacted]" in texts[1]
    # Another token is no other configuration.
    renewed = Secretive(hub_token="s3cret-renewed")
    assert store.begin("generate", "rollouts", renewed, str(tmp_path / "out")).finished


def test_importing_the_store_is_cheap():
    heavy = ("torch", "transformers", "datasets", "pandas", "huggingface_hub", "jinja2")
    code = f"import sys, pipeline.store; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
