"""The generate stage as a user runs it: files in, a repo out, kills and mistakes in between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.models import write_folder
from pipeline.store import open_repo, read_rollouts
from tests.playing import tiny_policy, tiny_tokenizer

ROOT = Path(__file__).parents[1]
STAGE = str(ROOT / "stages" / "generate.py")
GAME = ["--environment", "guessing_game", "--dataset", "guessing_game", "--maxlen", "6"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "policy"
    tokenizer = tiny_tokenizer()
    model = tiny_policy(tokenizer)
    write_folder(model, model.state_dict(), tokenizer, folder, torch.float32)
    return str(folder)


def generate(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, STAGE, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def shards(repo: Path) -> list[str]:
    manifest = json.loads((repo / "turnwise.json").read_text())
    return [entry["sha256"] for entry in manifest["files"]]


def test_kill_nine_then_the_same_command_gives_the_same_bytes(policy, tmp_path):
    """Killed when some rollouts are in the journal: none of them is played again."""
    args = ["--model", policy, *GAME, "--num_data", "60", "--max_batch_rows", "1"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert generate(*args, "--output_repo", whole).returncode == 0
    command = [sys.executable, STAGE, *args, "--concurrency", "1", "--output_repo", str(torn)]
    stage = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    journal = torn / ".turnwise" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size < 20_000:
        assert stage.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()
    kept = journal.read_bytes()
    assert 0 < kept.count(b"\n") < 120
    with journal.open("ab") as file:
        file.write(b'{"prompt_id": "game-0-00000')  # a torn line
    resumed = generate(*args, "--output_repo", torn)
    assert resumed.returncode == 0, resumed.stderr
    assert shards(torn) == shards(whole)
    assert not (torn / ".turnwise").exists()


def test_a_finished_repo_is_verified_and_left_alone(policy, tmp_path):
    args = ["--model", policy, *GAME, "--num_data", "3", "--output_repo", tmp_path / "out"]
    assert generate(*args).returncode == 0
    before = (tmp_path / "out" / "turnwise.json").stat().st_mtime_ns
    again = generate(*args)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "turnwise.json").stat().st_mtime_ns == before
    other = generate(*args, "--seed", "9")
    assert other.returncode == 2
    assert "seed" in other.stderr and "Traceback" not in other.stderr


def test_rollouts_of_the_repo_are_whole(policy, tmp_path):
    out = tmp_path / "out"
    done = generate("--model", policy, *GAME, "--num_data", "8", "--output_repo", out)
    assert done.returncode == 0, done.stderr
    repo = open_repo(str(out))
    rollouts = list(read_rollouts(repo))
    assert [r.key for r in rollouts] == sorted(r.key for r in rollouts)
    assert len(rollouts) == 16
    assert all(len(r.turns) == r.score_turn + 1 and r.status == "complete" for r in rollouts)
    assert all(len(t.logprobs) == len(t.response_ids) for r in rollouts for t in r.turns)
    assert repo.manifest["counts"]["status_complete"] == 16
    assert repo.manifest["models"]["model"]["fingerprint"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["--plan", "refule", "--engine", "vlm"],
            ["--plan refule", "refuel_uniform", "--engine vlm"],
        ),
        (["--nonsense", "1"], ["nonsense"]),
        (["--model", "./nowhere"], ["./nowhere"]),
        (["--engine", "scripted"], ["--script"]),
        (["--num_turns", "0"], ["--num_turns 0"]),
        (["--template_kwargs", "[1]"], ["--template_kwargs must be JSON"]),
        (["--stop_phrase", "bye"], ["--stop_phrase needs a user model"]),
        (["--retries", "-1"], ["--retries", "negative"]),
        (["--environment", "fixed_user"], ["guessing_game go together"]),
        (["--environment", "fixed_user", "--dataset", "rows.jsonl"], ["no such file"]),
    ],
)
def test_mistakes_are_told_in_one_line_and_write_nothing(policy, tmp_path, args, told):
    out = tmp_path / "out"
    base = ["--model", policy, *GAME, "--num_data", "2", "--output_repo", out]
    failed = generate(*base, *args)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert all(word in failed.stderr for word in told), failed.stderr
    assert not (out / "turnwise.json").exists()


def test_a_model_without_a_chat_template_is_refused(policy, tmp_path):
    bare = tmp_path / "bare"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model = tiny_policy(tokenizer)
    write_folder(model, model.state_dict(), tokenizer, bare, torch.float32)
    failed = generate("--model", bare, *GAME, "--num_data", "2", "--output_repo", tmp_path / "out")
    assert failed.returncode == 2
    assert "has no chat template" in failed.stderr


def test_a_folder_that_holds_something_else_is_refused_and_untouched(policy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    args = ["--model", policy, *GAME, "--num_data", "2", "--output_repo", tmp_path / "out"]
    failed = generate(*args)
    assert failed.returncode == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_rows_that_are_no_dialogue_are_dropped_and_counted(policy, tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "hi"}, {"text": "?"}, "torn"]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    done = generate(
        "--model", policy, "--environment", "fixed_user", "--dataset", source, "--plan",
        "independent", "--group_size", "1", "--maxlen", "4", "--output_repo", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dropped = json.loads((out / "turnwise.json").read_text())["dropped"]
    assert dropped == {"duplicate": 1, "no_messages": 1, "not_an_object": 1}
    assert open_repo(str(out)).num_rows() == 1


ASKING = """
def play(messages, draw):
    text = messages[-1]["content"]
    if "user of a chat assistant" in text:
        asked = text.count("Assistant:")
        question = "THE END" if asked > 2 else f"and then? {int(draw.integers(1000))}"
        return f"Justification: x\\nQuestion: {question}###noise"
    return f"{len(messages)} {messages[0]['role']} {messages[0]['content']} STOP tail"
"""


@pytest.fixture
def asking(policy, tmp_path, monkeypatch) -> list[str]:
    """Return the flags of a scripted policy and a scripted user."""
    (tmp_path / "asking.py").write_text(ASKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{n}"} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model", policy, "--user_model", policy, "--engine", "scripted"),
        *("--script", "asking:play", "--dataset", str(source), "--max_model_len", "4096"),
        *("--user_max_model_len", "4096", "--plan", "independent", "--group_size", "1"),
    ]


def test_each_party_has_its_own_controls(asking, tmp_path):
    """The policy's system prompt and stop text, the user's stop text, and its stop phrase."""
    out = tmp_path / "out"
    done = generate(
        *asking, "--system_prompt", "Be brief.", "--stop", "STOP", "--user_stop", "###",
        "--stop_phrase", "THE END", "--num_turns", "6", "--output_repo", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rollouts = list(read_rollouts(open_repo(str(out))))
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert (rollout.status, rollout.end_reason) == ("ended_early", "stop_phrase")
        assert rollout.score_turn == len(rollout.turns) - 1 == 2
        assert rollout.messages[0] == {"role": "system", "content": "Be brief."}
        said = [m["content"] for m in rollout.messages if m["role"] == "assistant"]
        assert said == [f"{n} system Be brief. STOP" for n in (2, 4, 6)]
        asked = [m["content"] for m in rollout.messages if m["role"] == "user"]
        assert all(text.startswith("and then? ") and "#" not in text for text in asked[1:])
    manifest = json.loads((out / "turnwise.json").read_text())
    assert manifest["counts"]["end_stop_phrase"] == 4
    spent = manifest["extra"]["spent"]
    assert spent["policy"]["requests"] == 12 and spent["user"]["requests"] == 12
    assert spent["policy"]["tokens_out"] == sum(
        len(turn.response_ids) for rollout in rollouts for turn in rollout.turns
    )


def test_a_dry_run_tells_the_work_and_writes_nothing(asking, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = generate(*asking, "--num_turns", "3", "--dry_run")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0] == ("4 prompts make 4 rollouts: at the most 12 policy turns and 8 replies")
    assert told[2].startswith("policy: ") and told[3].startswith("user: ")
    assert told[4].startswith("time: about 0:0")
    assert sorted(tmp_path.iterdir()) == before


def test_a_template_without_a_system_role_refuses_a_system_prompt(policy, tmp_path):
    bare = tmp_path / "bare"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    model = tiny_policy(tokenizer)
    write_folder(model, model.state_dict(), tokenizer, bare, torch.float32)
    failed = generate(
        "--model", bare, *GAME, "--num_data", "2", "--system_prompt", "x", "--output_repo",
        tmp_path / "out",
    )  # fmt: skip
    assert failed.returncode == 2
    assert "takes no system prompt (no system role)" in failed.stderr
    assert "leave out --system_prompt" in failed.stderr


def test_the_line_in_a_log_says_what_was_done(policy, tmp_path):
    out = tmp_path / "out"
    done = generate(
        "--model", policy, *GAME, "--engine", "scripted", "--script", "guessing_game",
        "--num_data", "50", "--output_repo", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "100 of 100 dialogues · 0 in flight · 0 failed · policy" in done.stderr
