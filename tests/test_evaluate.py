"""The evaluate stage: real repos in, a table, a picture and a verdict out."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import store
from pipeline.records import RANKED, Message, Rollout, Turn
from pipeline.rows import rollout_row

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Made:
    name: str


def ranked(folder: Path, rewards: dict[str, list[float]]) -> str:
    rows = []
    for prompt_id, values in rewards.items():
        messages = [Message(role="user", content="q"), Message(role="assistant", content="a")]
        turns = [Turn(0, [1], [2], None, "stop") for _ in values]
        rollout = Rollout(
            prompt_id, 0, messages, turns, None, len(values) - 1, "complete", "score_turn"
        )
        rollout.rewards = list(values)
        rollout.reward_errors = [None] * len(values)
        rollout.reward_model = "rule:x"
        rows.append(rollout_row(rollout))
    run = store.begin("rank", "ranked", Made(folder.name), str(folder))
    run.write({"train": pa.Table.from_pylist(rows, schema=RANKED)}, counts={})
    return str(folder)


def evaluate(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "stages" / "evaluate.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_table_picture_and_verdict(tmp_path):
    prompts = [f"p{n:02d}" for n in range(40)]
    old = ranked(tmp_path / "old", {p: [0.1, 0.2 + 0.001 * n] for n, p in enumerate(prompts)})
    new = ranked(tmp_path / "new", {p: [0.1, 0.4 + 0.001 * n] for n, p in enumerate(prompts)})
    out = tmp_path / "out"
    args = ["--input_repo", old, new, "--names", "before", "after", "--output_repo", "./out"]
    done = evaluate(*args, "--require_gain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = store.open_repo(str(out)).table().to_pylist()
    last = rows[-1]
    assert (last["policy"], last["turn"], last["prompts"]) == ("after", 1, 40)
    assert abs(last["score"] - 0.4195) < 1e-12
    assert (last["win_rate"], last["win_rate_half_width"]) == (1.0, 0.0)
    assert (rows[2]["win_rate"], rows[1]["win_rate"]) == (0.5, 0.5)  # ties, and itself
    assert "0.420±0.004" in done.stdout
    picture = (out / "pictures" / "score_by_turn.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    again = evaluate(*args, "--require_gain", cwd=tmp_path)
    assert again.returncode == 0 and "0.420±0.004" in again.stdout


def test_no_gain_is_exit_code_one(tmp_path):
    rewards = {f"p{n}": [0.1 * n] for n in range(9)}
    old, new = ranked(tmp_path / "old", rewards), ranked(tmp_path / "new", rewards)
    failed = evaluate("--input_repo", old, new, "--output_repo", tmp_path / "o", "--require_gain")
    assert failed.returncode == 1
    assert "not above the first's" in failed.stderr


def test_policies_without_a_common_prompt_are_refused(tmp_path):
    old, new = ranked(tmp_path / "old", {"a": [0.1]}), ranked(tmp_path / "new", {"b": [0.1]})
    failed = evaluate("--input_repo", old, new, "--output_repo", tmp_path / "o")
    assert failed.returncode == 2
    assert "share no prompt" in failed.stderr


def test_unranked_rollouts_name_the_stage_that_is_missing(tmp_path):
    rows = [{"prompt_id": "a", "sample": 0}]
    run = store.begin("generate", "rollouts", Made("x"), str(tmp_path / "raw"))
    run.write({"train": pa.Table.from_pylist(rows)}, counts={})
    failed = evaluate("--input_repo", tmp_path / "raw", "--output_repo", tmp_path / "o")
    assert failed.returncode == 2
    assert "'rewards' (stages/rank.py writes it)" in failed.stderr


def test_a_repo_of_no_rows_is_never_half_written(tmp_path):
    failed = evaluate("--input_repo", tmp_path / "nowhere", "--output_repo", tmp_path / "o")
    assert failed.returncode == 2
    assert not (tmp_path / "o" / "turnwise.json").exists()
