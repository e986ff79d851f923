import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import store
from pipeline.errors import DataError
from small_repos import Config, write_rollouts

ROOT = Path(__file__).resolve().parent.parent

STAGE = """
import os, signal, sys
from pathlib import Path
from pipeline import store
from small_repos import Config
from test_model_folders import save

run = store.begin_model("sft", Config(), sys.argv[1])
(run.work / "cache.bin").write_bytes(b"kept")
def die(folder):
    save(folder)
    os.kill(os.getpid(), signal.SIGKILL)
run.finish(die)
"""


def save(folder, value=1.0):
    save_file({"w": np.full(4, value, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("peft's own card")


def test_a_model_folder_appears_with_card_manifest_and_metrics(tmp_path):
    parent = write_rollouts(tmp_path / "pairs")
    out = tmp_path / "policy"
    run = store.begin_model("refuel", Config(), str(out), inputs=[parent], models={"base": "f00"})
    assert not run.finished
    assert not out.exists()
    (run.work / "metrics.jsonl").write_text('{"loss": 1}\n')
    path = run.finish(save, counts={"pairs": 3}, metrics={"loss": 0.25})
    assert path == out
    names = ["README.md", "config.json", "metrics.jsonl", "model.safetensors", "turnwise.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs", "policy"]
    manifest = json.loads((out / "turnwise.json").read_text())
    assert manifest["kind"] == "model"
    assert manifest["metrics"] == {"loss": 0.25}
    assert manifest["fingerprint"] == store.fingerprint_model(str(out))
    assert [f["path"] for f in manifest["files"]] == names[1:4]
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| loss | 0.25 |" in card
    with pytest.raises(DataError, match="holds a model"):
        store.open_repo(str(out))


def test_a_finished_model_is_verified_another_configuration_refused(tmp_path, capsys):
    out = tmp_path / "policy"
    store.begin_model("sft", Config(), str(out)).finish(save)
    assert store.begin_model("sft", Config(), str(out)).finished
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(DataError) as caught:
        store.begin_model("sft", Config(temperature=1.0), str(out))
    assert "config.temperature: 0.8 -> 1.0" in str(caught.value)
    assert f"another --output_dir, or start over after: rm -r {out} {out}.work" in str(caught.value)
    (out / "config.json").write_text('{"x": 1}')
    with pytest.raises(DataError, match=r"config\.json isn't the file"):
        store.begin_model("sft", Config(), str(out))


def test_a_kill_while_saving_leaves_no_model_and_the_work_folder(tmp_path):
    out = tmp_path / "policy"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", STAGE, str(out)]
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=60, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    with pytest.raises(DataError, match="isn't finished; resume it with: "):
        store.fingerprint_model(str(out))
    run = store.begin_model("sft", Config(), str(out))
    assert (run.work / "cache.bin").read_bytes() == b"kept"
    run.finish(save)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_foreign_folders_are_refused_untouched(tmp_path):
    out = tmp_path / "policy"
    out.mkdir()
    (out / "notes").write_text("precious")
    with pytest.raises(DataError, match=r"holds something else \(notes\)"):
        store.begin_model("sft", Config(), str(out))
    # The scratch folder is deleted at the end, so it has to be ours too.
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "notes").write_text("precious")
    with pytest.raises(DataError, match=r"other\.work holds something else \(notes\)"):
        store.begin_model("sft", Config(), str(tmp_path / "other"))
    assert (out / "notes").read_text() == "precious"
    assert (tmp_path / "other.work" / "notes").read_text() == "precious"


def test_a_folder_filled_while_the_stage_ran_is_not_replaced(tmp_path):
    out = tmp_path / "policy"
    run = store.begin_model("sft", Config(), str(out))
    out.mkdir()
    (out / "notes").write_text("precious")
    with pytest.raises(OSError, match="not empty"):
        run.finish(save)
    assert (out / "notes").read_text() == "precious"
