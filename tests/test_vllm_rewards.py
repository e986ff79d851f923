"""One real vLLM pooling server, and one that rank starts itself: scores are the model's own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from pipeline.engines.base import EngineOptions
from pipeline.engines.rounds import Rounds
from pipeline.errors import EngineError
from pipeline.records import ROLLOUTS, Message, Rollout
from pipeline.repos import open_repo
from pipeline.rewards import Settings, load_reward, load_served
from pipeline.rewards.served import ServedReward
from pipeline.rows import rollout_row
from pooling_fixtures import dialogue, own_ids
from reward_models import one_thread, write_classifier  # noqa: F401
from templates import QWEN3

ROOT = Path(__file__).resolve().parent.parent
# Compiling takes longer than these tests do; a CPU's blocks of 128 ids would hide the cache.
ARGS = ("--enforce-eager", "--block-size", "32")
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
LIMIT = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("plain") / "classifier", **SHAPE)


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedReward]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    logs = tmp_path_factory.mktemp("logs")
    options = EngineOptions(Rounds(), log_dir=logs, extra_args=ARGS)
    reward = load_served(str(folder), Settings(max_length=LIMIT), options)
    yield reward
    reward.close()


def forked(prompt: int) -> list[Rollout]:
    """Two rollouts that part at their second turn."""
    pair = [dialogue(4, f"p{prompt}"), dialogue(4, f"p{prompt}", 1)]
    pair[1].messages[:2] = pair[0].messages[:2]
    return pair


def cached(reward: ServedReward) -> float:
    """Return how many ids the server has read from its cache so far."""
    text = httpx.get(f"{reward.line.servers[0].url}/metrics", trust_env=False).text
    return sum(map(float, re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (.*)$", text, re.M)))


def test_every_turn_scores_as_in_this_process(folder: Path, served: ServedReward) -> None:
    rollouts = [rollout for prompt in range(24) for rollout in forked(prompt)]
    before = cached(served)
    theirs = served.score(rollouts, [range(4)] * 48)
    hits = cached(served) - before
    ours = load_reward(str(folder)).score(rollouts, [range(4)] * 48)
    assert [one.errors for one in theirs] == [[None] * 4] * 48
    for one, other in zip(ours, theirs, strict=True):
        assert other.rewards == pytest.approx(one.rewards, rel=1e-3, abs=1e-4)
    ids = [[len(own_ids(folder, r, turn)) for turn in range(4)] for r in rollouts]
    # Of each prefix all whole blocks were read before, but for the last dialogue's end.
    assert hits > 0.8 * sum(32 * (n // 32) for lengths in ids for n in lengths[:-1])


def test_needed_turns_and_any_order_score_the_same(served: ServedReward) -> None:
    rollouts = [rollout for prompt in range(8) for rollout in forked(prompt)]
    every = served.score(rollouts, [range(4)] * 16)
    needed = served.score(rollouts[::-1], [[2]] * 16)[::-1]
    for one, other in zip(every, needed, strict=True):
        assert [value is None for value in other.rewards] == [True, True, False, True]
        assert other.rewards[2] == pytest.approx(one.rewards[2], rel=1e-4, abs=1e-5)


def test_a_template_that_rewrites_is_followed(
    folder: Path, served: ServedReward, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = QWEN3
    thinking = write_classifier(tmp_path / "classifier", tokenizer, **SHAPE)
    rollouts = forked(1)
    for rollout in rollouts:
        rollout.messages[3]["content"] = "<think>\nhm\n</think>\n\nYes."
    urls = (served.line.servers[0].url,)
    reward = load_served(
        str(thinking), Settings(max_length=LIMIT), EngineOptions(Rounds(), urls=urls)
    )
    try:
        theirs = reward.score(rollouts, [range(4)] * 2)
    finally:
        reward.close()
    assert reward.separate
    ours = load_reward(str(thinking)).score(rollouts, [range(4)] * 2)
    for one, other in zip(ours, theirs, strict=True):
        assert other.rewards == pytest.approx(one.rewards, rel=1e-3, abs=1e-4)


def test_the_longest_prefix_is_scored_and_a_longer_one_is_not(
    folder: Path, served: ServedReward
) -> None:
    short = dialogue(1, "p")
    room = LIMIT - len(own_ids(folder, short, 0))
    asked = short.messages[0]["content"]
    fits, long = dialogue(1, "p"), dialogue(1, "p")
    fits.messages[0] = Message(role="user", content=asked + "~" * room)
    long.messages[0] = Message(role="user", content=asked + "~" * (room + 1))
    assert len(own_ids(folder, fits, 0)) == LIMIT
    theirs = served.score([fits, long], [[0], [0]])
    [ours] = load_reward(str(folder)).score([fits], [[0]])
    assert theirs[0].rewards == pytest.approx(ours.rewards, rel=1e-3, abs=1e-4)
    assert (theirs[1].rewards, theirs[1].errors) == ([None], ["too_long"])


def test_an_id_that_the_model_does_not_have_stops_with_the_row(
    folder: Path, served: ServedReward, tmp_path: Path
) -> None:
    """A folder whose tokenizer isn't the served model's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["~~~~"])
    grown = write_classifier(tmp_path / "classifier", tokenizer, **SHAPE)
    urls = (served.line.servers[0].url,)
    options = EngineOptions(Rounds(), urls=urls)
    reward = load_served(str(grown), Settings(max_length=LIMIT), options)
    try:
        with pytest.raises(EngineError, match=r"prompt_id '~~~~', sample 0: .*out of vocabulary"):
            reward.score([dialogue(1, "~~~~")], [[0]])
    finally:
        reward.close()


def test_rank_starts_a_server_and_ends_it(folder: Path, tmp_path: Path) -> None:
    rollouts = [rollout for prompt in range(20) for rollout in forked(prompt)]
    model = shutil.copytree(folder, tmp_path / "model")  # whose path only this server's command has
    (tmp_path / "rollouts" / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([rollout_row(row) for row in rollouts], schema=ROLLOUTS)
    pq.write_table(table, tmp_path / "rollouts" / "data" / "train-00000-of-00001.parquet")
    command = [sys.executable, str(ROOT / "stages" / "rank.py"), "--engine", "vllm"]
    command += ["--prompts", str(tmp_path / "rollouts"), "--reward_model", str(model)]
    command += ["--output_repo", str(tmp_path / "ranked"), "--server_args=--enforce-eager"]
    done = subprocess.run(
        command,
        env={"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = open_repo(str(tmp_path / "ranked")).table("train").to_pylist()
    ours = load_reward(str(folder)).score(rollouts, [[3]] * 40)
    for row, scored in zip(rows, ours, strict=True):
        assert row["rewards"][:3] == [None] * 3
        assert row["rewards"][3] == pytest.approx(scored.rewards[3], rel=1e-3, abs=1e-4)
    assert not [command for command in commands() if str(model).encode() in command]


def commands() -> Iterator[bytes]:
    """Yield the command of every process that runs."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            yield file.read_bytes()
