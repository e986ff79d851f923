import json

import pytest

from pipeline import manifest
from pipeline.errors import DataError

SECRET = "hf_AbCdEfGhIjKlMnOp"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("hub_token", "abc", "[redacted]"),
        ("api_key", "abc", "[redacted]"),
        ("apikey", "abc", "[redacted]"),
        ("wandb_password", "abc", "[redacted]"),
        ("note", f"use {SECRET} here", "use [redacted] here"),
        ("url", "https://me:pass@host:1/v1", "https://[redacted]@host:1/v1"),
        ("url", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("openai", "sk-proj-0123456789abcdef", "[redacted]"),
        ("max_tokens", 1024, 1024),
        ("tokenizer", "./policy", "./policy"),
        ("hub_token", "", ""),
        ("hub_token", None, None),
        ("shelf_token", 3, 3),
        ("dataset", "shelf_life", "shelf_life"),
    ],
)
def test_secrets_are_redacted_and_nothing_else(name, value, shown):
    assert manifest.redact({"nested": [{name: value}]}) == {"nested": [{name: shown}]}


def test_the_command_can_be_typed_again_and_holds_no_secret(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    argv = ["/home/me/turnwise/stages/rank.py", "--prompts", "./a b", f"--hub_token={SECRET}"]
    argv += ["--api_key", "abc", "--temperature", "0.8", "--note", SECRET]
    assert manifest.command_line(argv) == (
        "python stages/rank.py --prompts './a b' '--hub_token=[redacted]' --api_key '[redacted]' "
        "--temperature 0.8 --note '[redacted]'"
    )


def test_a_launched_command_names_the_launcher_and_the_processes(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert manifest.command_line(["stages/refuel.py", "--lr", "1e-7"]) == (
        "accelerate launch --num_processes 2 stages/refuel.py --lr 1e-7"
    )


def test_differences_are_told_field_by_field():
    old = {"config": {"seed": 1, "task": {"length": 5}}, "models": {}}
    new = {"config": {"seed": 2, "task": {"length": 5}, "plan": "refuel"}, "models": {}}
    assert manifest.differences(old, new) == [
        "config.seed: 1 -> 2",
        'config.plan: absent -> "refuel"',
    ]


def test_versions_name_what_is_installed_without_importing_it():
    found = manifest.versions()
    assert found["turnwise"] == "0.1.0"
    assert found["pyarrow"].split(".")[0].isdigit()


def test_a_manifest_that_was_edited_or_is_not_ours_is_refused(tmp_path):
    path = tmp_path / "turnwise.json"
    assert manifest.read_json(path) is None
    path.write_text("{")
    with pytest.raises(DataError, match=r"turnwise\.json is no JSON"):
        manifest.read_json(path)
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(DataError, match="wasn't written by Turnwise"):
        manifest.read_json(path)


def test_a_content_hash_depends_on_the_files_and_not_on_their_order():
    files = [{"path": "a", "sha256": "1", "bytes": 1}, {"path": "b", "sha256": "2", "bytes": 9}]
    assert manifest.content_hash(files) == manifest.content_hash(reversed(files))
    assert manifest.content_hash(files) != manifest.content_hash(files[:1])
    swapped = [{"path": "a", "sha256": "2"}, {"path": "b", "sha256": "1"}]
    assert manifest.content_hash(files) != manifest.content_hash(swapped)


def test_a_file_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "turnwise.json"
    manifest.write_atomically(path, b"one")
    manifest.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["turnwise.json"]
