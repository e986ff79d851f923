import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import DataError
from pipeline.fingerprints import fingerprint_model


def model(folder, big=None):
    folder.mkdir(exist_ok=True)
    tensors = {"big": np.zeros(100_000, dtype=np.float32) if big is None else big}
    save_file({**tensors, "small": np.ones(3, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_copy_has_the_same_fingerprint_and_notes_do_not_count(tmp_path):
    first = fingerprint_model(str(model(tmp_path / "a")))
    copy = model(tmp_path / "b")
    (copy / "README.md").write_text("notes")
    assert fingerprint_model(str(copy)) == first
    assert len(first) == 32


def test_weights_config_and_tokenizer_count(tmp_path):
    folder = model(tmp_path / "a")
    found = [fingerprint_model(str(folder))]
    trained = np.zeros(100_000, dtype=np.float32)
    trained[50_000] = 1e-7
    model(folder, big=trained)
    found.append(fingerprint_model(str(folder)))
    model(folder, big=np.zeros((100, 1000), dtype=np.float32))
    found.append(fingerprint_model(str(folder)))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text("changed")
        found.append(fingerprint_model(str(folder)))
    assert len(set(found)) == 7


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no model folder \./policy"):
        fingerprint_model("./policy")
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="no model folder runs/policy"):
        fingerprint_model("runs/policy")
    with pytest.raises(DataError, match="holds no model"):
        fingerprint_model(str(tmp_path / "runs"))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"aren't safetensors \(pytorch_model\.bin\)"):
        fingerprint_model(str(tmp_path))


def test_a_torn_weights_file_is_named(tmp_path):
    folder = model(tmp_path / "a")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"model\.safetensors is no safetensors file"):
        fingerprint_model(str(folder))
