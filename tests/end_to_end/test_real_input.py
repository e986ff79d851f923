"""Real dialogues through real parts: vLLM servers, reward models, two processes, two iterations.

32 prompts of UltraInteract's layout and 32 of HH, once through two vLLM servers that the stage
starts (a simulated user asks), once through the hf engine (HH's own user turns are replayed).
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import PairExample, Rollout
from pipeline.rows import pair_from_row
from pipeline.store import open_repo, read_rollouts
from tests.end_to_end import wired
from tests.reward_models import write_armorm, write_classifier

ROOT = Path(__file__).parents[2]
ETA = 5.0

pytestmark = pytest.mark.skipif(
    not wired.GSM8K.exists(), reason="the real inputs are not beside the project"
)


def run(launcher: list[str], stage: str, **flags: object) -> str:
    """Run a stage as a user does and return what it printed."""
    command = [*launcher, str(ROOT / "stages" / f"{stage}.py")]
    for name, value in flags.items():
        # One word, because a value may begin with dashes itself.
        command.append(f"--{name.replace('__', '.')}={value}")
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | threads
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def stage(name: str, **flags: object) -> str:
    return run([sys.executable], name, **flags)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = wired.tokenizer()
    return {
        "policy": wired.write_policy(folder / "policy", tokenizer),
        "user": wired.write_user(folder / "user", tokenizer),
        "armorm": write_armorm(folder / "armorm"),
        "fsfairx": write_classifier(folder / "fsfairx"),
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    math, chats = wired.real_rows(32)
    paths = {}
    for name, rows in {"both": [*math, *chats], "hh": chats}.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def path_of(folder: Path, models: dict[str, Path], reward: str, **generate: object) -> Path:
    """Run one iteration into a folder: rollouts, ranked, pairs, policy. Return the folder."""
    stage(
        "generate",
        model=models["policy"],
        output_repo=folder / "rollouts",
        maxlen=24,
        dtype="float32",
        **generate,
    )
    stage(
        "rank",
        prompts=folder / "rollouts",
        reward_model=models[reward],
        turns="all",
        output_repo=folder / "ranked",
    )
    stage(
        "tokenize_masks",
        input_repo=folder / "ranked",
        output_repo=folder / "pairs",
        max_length=wired.CONTEXT,
        test_size=4,
    )
    train(folder, models["policy"])
    return folder


def train(folder: Path, base: Path) -> None:
    """REFUEL for five updates of four pairs, two processes."""
    told = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
        "refuel",
        task__query_dataset=folder / "pairs",
        task__cluster="here",
        task__total_length=wired.CONTEXT,
        task__temperature=0.8,
        refuel__eta=ETA,
        lr=1e-3,
        total_episodes=20,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_processes=2,
        base_model=base,
        output_dir=folder / "policy",
    )
    assert "2 process(es)" in told


@pytest.fixture(scope="module")
def served(models, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    return path_of(
        folder,
        models,
        "armorm",
        user_model=models["user"],
        engine="vllm",
        server_args="--enforce-eager",
        dataset=prompts["both"],
        environment="simulated_user",
        output_dir=folder / "logs",
    )


@pytest.fixture(scope="module")
def embedded(models, prompts, tmp_path_factory) -> Path:
    return path_of(
        tmp_path_factory.mktemp("hf"),
        models,
        "fsfairx",
        engine="hf",
        dataset=prompts["both"],
        environment="fixed_user",
        plan="refuel_uniform",
        num_turns=3,
    )


@pytest.fixture(scope="module", params=["served", "embedded"])
def iteration(request) -> Path:
    return request.getfixturevalue(request.param)


def rollouts(folder: Path) -> list[Rollout]:
    return list(read_rollouts(open_repo(str(folder / "ranked"))))


def pairs(repo: Path) -> list[PairExample]:
    opened = open_repo(str(repo))
    return [
        pair_from_row(row) for split in opened.splits() for row in opened.table(split).to_pylist()
    ]


def contexts(rollout: Rollout) -> list[list[int]]:
    seen, context = [], []
    for turn in rollout.turns:
        context = context[: turn.keep] + turn.prompt_ids
        seen.append(context)
        context = context + turn.response_ids
    return seen


def test_dialogues_alternate_and_have_one_bos(iteration, models):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["policy"])
    played = rollouts(iteration)
    assert len({r.prompt_id for r in played}) == 64
    for rollout in played:
        roles = [message["role"] for message in rollout.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(rollout.turns) == roles.count("assistant")
        given = [id_ for turn in rollout.turns for id_ in turn.prompt_ids]
        assert given[0] == tokenizer.bos_token_id
        assert given.count(tokenizer.bos_token_id) == 1
        for before, after in itertools.pairwise(contexts(rollout)):
            assert after[: len(before)] == before


def test_ids_are_the_templates_own_up_to_what_was_sampled(iteration, models):
    """The first context is what transformers makes of the messages; later ones add its bridge."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["policy"])
    for rollout in rollouts(iteration):
        opening = rollout.messages[:1]
        assert rollout.turns[0].prompt_ids == tokenizer.apply_chat_template(
            opening, add_generation_prompt=True, return_dict=False
        )
        for turn, before, message in zip(
            rollout.turns[1:], rollout.turns, rollout.messages[2::2], strict=False
        ):
            alone = tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, return_dict=False
            )
            cut = before.finish_reason == "length"
            assert turn.prompt_ids == [*([tokenizer.eos_token_id] if cut else []), *alone[1:]]


def test_simulated_questions_are_questions(served):
    played = rollouts(served)
    said = [m["content"] for r in played for m in r.messages[2::2]]
    assert set(said) == {"why?", "how?", "what?"}
    assert {r.end_reason for r in played} == {"score_turn"}
    assert all(len(r.turns) == r.score_turn + 1 for r in played)


def test_the_datasets_user_turns_are_replayed(embedded, prompts):
    from pipeline.prompts import load_prompts

    wanted = list(load_prompts(str(prompts["both"]), "train", 0, 0, keep_user_turns=True))
    users = {p.prompt_id: [p.messages[0]["content"], *p.info.get("user_turns", [])] for p in wanted}
    assert len(users) == 64
    for rollout in rollouts(embedded):
        said = [m["content"] for m in rollout.messages if m["role"] == "user"]
        assert said == users[rollout.prompt_id][: len(said)]


def test_engine_logprobs_are_the_trainers(iteration):
    """What the engine reported while sampling, against what the trainer computes: 1e-4."""
    checked = 0
    for pair in pairs(iteration / "pairs_here"):
        for member in (pair.chosen, pair.reject):
            assert member.sample_logprob is not None and member.old_logprob is not None
            np.testing.assert_allclose(member.sample_logprob, member.old_logprob, atol=1e-4)
            checked += len(member.old_logprob)
    assert checked > 100


def test_masks_are_exactly_the_sampled_ids_of_the_forked_turn(iteration):
    by_key = {rollout.key: rollout for rollout in rollouts(iteration)}
    made = pairs(iteration / "pairs")
    assert len(made) >= 24
    for pair in made:
        for member in (pair.chosen, pair.reject):
            rollout = by_key[pair.prompt_id, member.sample]
            h = rollout.branch_turn
            context, response = contexts(rollout)[h], rollout.turns[h].response_ids
            assert member.sequence.ids.tolist() == context + response
            assert member.sequence.mask.tolist() == [0] * len(context) + [1] * len(response)
            assert member.reward == rollout.rewards[rollout.score_turn]
        assert pair.chosen.reward > pair.reject.reward
        assert pair.prefix_length == len(contexts(by_key[pair.prompt_id, 0])[pair.branch_turn])


def test_no_row_is_lost_without_a_reason(iteration):
    dropped = [json.loads(line) for line in (iteration / "pairs" / "dropped.jsonl").open()]
    prompts = {r.prompt_id for r in rollouts(iteration)}
    kept = {pair.prompt_id for pair in pairs(iteration / "pairs")}
    assert kept | {row["prompt_id"] for row in dropped} == prompts
    assert not kept & {row["prompt_id"] for row in dropped}
    assert all(row["reason"] for row in dropped)


def test_splits_share_no_prompt(iteration):
    repo = open_repo(str(iteration / "pairs"))
    train, test = (set(repo.table(s)["prompt_id"].to_pylist()) for s in ("train", "test"))
    assert len(test) == 4 and not train & test


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_the_first_update_starts_from_delta_zero(iteration):
    """loss = eta^2 mean (r_chosen - r_reject)^2, on the pairs of the step and on the test."""
    rows = metrics(iteration / "policy")
    repo = open_repo(str(iteration / "pairs")).table("test").to_pylist()
    gaps = [row["chosen_reward"] - row["reject_reward"] for row in repo]
    start = next(row for row in rows if "val_loss" in row)
    assert start["update"] == 0
    assert start["val_loss"] == pytest.approx(ETA**2 * np.mean(np.square(gaps)), rel=1e-4)
    assert start["val_delta_chosen"] == pytest.approx(0, abs=1e-5)
    first = next(row for row in rows if "loss" in row)
    assert first["update"] == 1
    assert first["delta_chosen"] == pytest.approx(0, abs=1e-4)
    assert first["delta_reject"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] >= ETA**2 * first["reward_gap"] ** 2 * (1 - 1e-3)  # Jensen
    assert [row["update"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]


def test_the_cluster_repo_is_reused_and_recomputed_with_a_reason(embedded, models):
    flags = {
        "task__query_dataset": embedded / "pairs",
        "task__cluster": "here",
        "task__total_length": wired.CONTEXT,
        "total_episodes": 8,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "base_model": models["policy"],
    }
    told = stage("refuel", **flags, output_dir=embedded / "again")
    assert "recompute" not in told
    told = stage("refuel", **flags, task__temperature=0.7, output_dir=embedded / "warmer")
    assert "temperature" in told and "0.8" in told and "0.7" in told


def test_the_saved_policy_plays_the_next_iteration(served, models, prompts, tmp_path):
    """Iteration 2 generates from what iteration 1 saved, and it has moved."""
    from safetensors.torch import load_file

    before, after = (
        load_file(p / "model.safetensors") for p in (models["policy"], served / "policy")
    )
    assert before.keys() == after.keys()
    moved = [name for name in before if not before[name].equal(after[name])]
    assert len(moved) > len(before) / 2
    stage(
        "generate",
        model=served / "policy",
        user_model=models["user"],
        dataset=prompts["both"],
        maxlen=24,
        num_data=8,
        output_repo=tmp_path / "rollouts",
    )
    second = list(read_rollouts(open_repo(str(tmp_path / "rollouts"))))
    assert len(second) == 16
    assert all(r.status == "complete" for r in second)


def test_evaluate_compares_the_two_policies(embedded, models, prompts, tmp_path):
    for name, model in {"start": models["policy"], "trained": embedded / "policy"}.items():
        stage(
            "generate",
            model=model,
            dataset=prompts["hh"],
            environment="fixed_user",
            plan="independent",
            group_size=1,
            num_turns=3,
            maxlen=24,
            output_repo=tmp_path / f"{name}_rollouts",
        )
        stage(
            "rank",
            prompts=tmp_path / f"{name}_rollouts",
            reward_model=models["fsfairx"],
            turns="all",
            output_repo=tmp_path / name,
        )
    stage(
        "evaluate",
        input_repo=tmp_path / "trained",
        baseline_repo=tmp_path / "start",
        output_repo=tmp_path / "evaluation",
    )
    turns = open_repo(str(tmp_path / "evaluation")).table().to_pylist()
    assert turns[0]["prompts"] >= 8
    assert all(0 <= row["win_rate"] <= 1 for row in turns if row["prompts"])
