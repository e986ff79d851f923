import time

import pytest

from fake_hub import serve
from pipeline import store
from pipeline.errors import DataError
from small_repos import Config, table

NO_WAIT = {"Retry-After": "0"}
TOKEN = "hf_FakeTokenForTests"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURNWISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sys.argv", ["stages/generate.py", "--output_repo", "org/rollouts"])
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    # Read by huggingface_hub when it is imported, so the variable would come too late.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def begin(**options):
    return store.begin("generate", "rollouts", Config(), "org/rollouts", seed=7, **options)


def write(**options):
    return begin(**options).write({"train": table(3)}, counts={}, dropped=[{"reason": "tie"}])


def test_a_stage_is_one_private_commit_of_card_shards_and_manifest(hub, tmp_path):
    repo = write()
    assert hub.visibility == {"org/rollouts": "private"}
    (commit,) = hub.commits
    assert commit["files"] == [
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00001.parquet",
        "dropped.jsonl",
        "turnwise.json",
    ]
    local = tmp_path / "home" / "repos" / "org--rollouts"
    assert (repo.path, repo.revision) == (local, hub.heads["org/rollouts"])
    files = hub.repos["org/rollouts"]
    assert {n: (local / n).read_bytes() for n in commit["files"][1:]} == {
        n: files[n] for n in commit["files"][1:]
    }
    assert {auth for _, auth in hub.requests} == {f"Bearer {TOKEN}"}
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []


def test_public_is_asked_for(hub):
    write(public=True)
    assert hub.visibility == {"org/rollouts": "public"}


def test_the_same_command_again_sends_nothing(hub):
    write()
    run = begin()
    assert run.finished
    assert run.revision == hub.heads["org/rollouts"]
    assert len(hub.commits) == 1


def test_an_outage_is_waited_for(hub):
    hub.failures["commit"] = [(503, NO_WAIT), (429, NO_WAIT), (500, NO_WAIT)]
    start = time.monotonic()
    assert write().revision == hub.heads["org/rollouts"]
    assert len(hub.commits) == 1
    # Retry-After is obeyed: unasked, the waits would be 1, 2 and 4 seconds.
    assert time.monotonic() - start < 5


def test_a_branch_that_moved_is_looked_at_again(hub):
    hub.failures["commit"] = [(412, NO_WAIT)]
    assert write().revision == hub.heads["org/rollouts"]
    assert len(hub.commits) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub):
    hub.failures["reply"] = [(504, NO_WAIT)]
    assert write().revision == hub.heads["org/rollouts"]
    assert len(hub.commits) == 1


def test_after_the_last_attempt_the_local_copy_is_complete_and_the_command_pushes_it(hub, tmp_path):
    hub.failures["commit"] = [(503, NO_WAIT)] * 6
    with pytest.raises(DataError) as caught:
        write()
    local = tmp_path / "home" / "repos" / "org--rollouts"
    message = str(caught.value)
    assert f"{local} is complete" in message
    assert "again" in message
    assert "python stages/generate.py --output_repo org/rollouts" in message
    assert "503" in message
    assert hub.failures["commit"] == []
    assert hub.commits == []
    with pytest.raises(DataError, match=r"isn't on the Hub yet.*python stages/generate\.py"):
        store.open_repo("org/rollouts")
    (local / ".DS_Store").write_text("not ours")
    run = begin()
    assert run.finished
    assert run.revision == hub.heads["org/rollouts"]
    assert ".DS_Store" not in hub.repos["org/rollouts"]
    assert hub.repos["org/rollouts"]["turnwise.json"] == (local / "turnwise.json").read_bytes()


def test_a_refused_token_is_not_tried_again(hub):
    hub.failures["commit"] = [(403, {}), (503, NO_WAIT)]
    with pytest.raises(DataError, match="couldn't be pushed"):
        write()
    assert hub.failures["commit"] == [(503, NO_WAIT)]


def test_an_output_without_a_token_is_refused_before_any_work(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"there is no token: set HF_TOKEN"):
        begin()
    assert hub.requests == []
    assert not (tmp_path / "home").exists()


def test_a_hub_repo_of_something_else_is_refused_before_any_work(hub, tmp_path):
    hub.set_files("org/rollouts", {"data.csv": b"1", "README.md": b""})
    with pytest.raises(DataError, match=r"something else \(no turnwise\.json, but data\.csv\)"):
        begin()
    assert hub.commits == []
    assert not (tmp_path / "home").exists()


def test_another_machine_finds_the_finished_repo(hub, tmp_path, monkeypatch, capsys):
    first = write()
    monkeypatch.setenv("TURNWISE_HOME", str(tmp_path / "other-machine"))
    run = begin()
    assert run.finished
    assert "on the Hub at revision" in capsys.readouterr().out
    assert run.repo().content_hash == first.content_hash
    assert run.repo().num_rows() == 3
    with pytest.raises(DataError, match=r"config\.temperature: 0\.8 -> 1\.0"):
        store.begin("generate", "rollouts", Config(temperature=1.0), "org/rollouts", seed=7)


def test_a_hub_repo_opens_from_the_local_copy_and_from_the_network(hub, tmp_path, monkeypatch):
    written = write()
    assert store.open_repo("org/rollouts").path == written.path
    monkeypatch.setenv("TURNWISE_HOME", str(tmp_path / "other-machine"))
    for text in ("org/rollouts", f"org/rollouts@{hub.heads['org/rollouts']}"):
        repo = store.open_repo(text)
        assert repo.path != written.path
        assert (repo.revision, repo.content_hash) == (written.revision, written.content_hash)
        assert [r.prompt_id for r in store.read_rollouts(repo)] == ["p0000", "p0001", "p0002"]


def test_a_hub_repo_that_is_not_there_is_named(hub):
    with pytest.raises(DataError, match="there is no dataset repo org/nothing on the Hub"):
        store.open_repo("org/nothing")


def test_an_outage_is_not_a_missing_repo(hub):
    hub.failures["look"] = [(503, NO_WAIT)] * 6
    with pytest.raises(DataError, match="can't look at the Hub repo org/rollouts"):
        begin()


def test_a_hub_model_is_known_by_the_hashes_that_the_hub_keeps(hub):
    hub.set_files("org/policy", {"config.json": b"{}", "model.safetensors": b"1", "notes.md": b"1"})
    first = store.fingerprint_model("org/policy")
    hub.set_files("org/policy", {"config.json": b"{}", "model.safetensors": b"1", "notes.md": b"2"})
    assert store.fingerprint_model("org/policy") == first
    hub.set_files("org/policy", {"config.json": b"{}", "model.safetensors": b"2"})
    assert store.fingerprint_model("org/policy") != first
    with pytest.raises(DataError, match="no such model on the Hub"):
        store.fingerprint_model("org/nothing")
