"""bench/rank.py in small: it runs, it compares like with like, and it counts right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.records import Message, Rollout
from pipeline.scoring import Chunk

BENCH = Path(__file__).parents[1] / "bench"
# A benchmark's own modules lie beside it, as they do when it is run by its file.
sys.path.append(str(BENCH))

from _rank_dialogues import Language, make_rollouts  # noqa: E402 - found by the path above
from _rank_report import Figures, differences, figures_of  # noqa: E402 - as above
from _rank_ways import Found, seed_share  # noqa: E402 - as above
from _rank_work import Page, Work, common_ids, read, read_pair, works_of  # noqa: E402 - as above
from _seed_rank import last_at  # noqa: E402 - as above
from _workload import Shape  # noqa: E402 - as above

RATIOS = {"all_turns_vs_seed", "needed_turns_vs_seed"}


def run(*flags: str) -> tuple[dict[str, float], subprocess.CompletedProcess[str]]:
    sizes = ["--device", "cpu", "--shape", "tiny", "--threads", "1", "--dialogue_ids", "120"]
    command = [sys.executable, str(BENCH / "rank.py"), *sizes, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done


def test_the_ways_score_alike_by_turns():
    result, done = run("--pairs", "17", "--blocks", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(result) == RATIOS | {"max_abs_difference"}
    # 34 rollouts are two chunks: the second block is the longest prompt's.
    assert all(0.2 < result[name] < 200 for name in RATIOS)
    assert 0 < result["max_abs_difference"] < 1e-4
    for way in ("all", "needed", "stage"):
        assert f"scores of {way} and the seed's differ by" in done.stdout


def test_it_runs_as_on_a_gpu_and_fails_where_scores_differ():
    mode = "--dtype bfloat16 --as_on_gpu --seed_every 2 --tolerance 1e-9"
    result, done = run("--pairs", "4", *mode.split())
    assert set(result) == RATIOS | {
        "max_abs_difference",
        "dialogues_per_s",
        "matmul_share",
        "peak_memory_gb",
    }
    assert all(0 < value < math.inf for value in result.values())
    assert 1e-9 < result["max_abs_difference"] < 2e-2
    assert done.returncode == 1
    assert "the scores differ by" in done.stderr


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(2048, turns=5, dialogue_ids=400, seed=3)


def test_dialogues_fork_as_planned_and_have_the_length_asked_for(language):
    rollouts = make_rollouts(language, 40)
    lengths = []
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert (first.prompt_id, first.sample, second.sample) == (second.prompt_id, 0, 1)
        turn = first.branch_turn
        assert turn == second.branch_turn
        assert 0 <= turn <= first.score_turn == second.score_turn < 5
        alike = [a == b for a, b in zip(first.messages, second.messages, strict=True)]
        assert alike[: 2 * turn + 1] == [True] * (2 * turn + 1)
        assert not any(alike[2 * turn + 1 :])
        for rollout in (first, second):
            assert [m["role"] for m in rollout.messages] == ["user", "assistant"] * 5
            page = language.tokenizer.apply_chat_template(rollout.messages, return_dict=False)
            lengths.append(len(page))
    assert sum(lengths) / len(lengths) == pytest.approx(400, rel=0.1)
    assert max(lengths) > 1.3 * min(lengths)
    assert {rollout.branch_turn for rollout in rollouts} == {0, 1, 2, 3, 4}
    assert make_rollouts(Language(2048, 5, 400, seed=3), 2) == rollouts[:4]
    assert make_rollouts(Language(2048, 5, 400, seed=4), 2) != rollouts[:4]


@pytest.mark.parametrize("said", ["Words.", "12 and 3", "- a list", '"quoted"', "(in brackets)"])
def test_a_header_keeps_its_ids_whatever_follows(language, said):
    """As with Llama 3's own tokenizer; else no gate would be found."""
    header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    pattern = language.tokenizer.encode(header, add_special_tokens=False)
    messages = [Message(role="user", content="Hi."), Message(role="assistant", content=said)]
    page = language.tokenizer.apply_chat_template(messages, return_dict=False)
    assert language.tokenizer.decode(page[: last_at(page, pattern)]).endswith("Hi.")


def test_the_last_header_counts():
    assert last_at([7, 8, 1, 7, 8, 2], [7, 8]) == 3
    with pytest.raises(ValueError, match="no assistant header"):
        last_at([7, 1, 8], [7, 8])


def test_work_by_hand():
    """Two pages of 6 and 5 ids share 3; prefixes end after 2 and all ids; the first is needed."""
    left, right = Page([1, 2, 3, 4, 5, 6], [2, 6], 0), Page([1, 2, 3, 9, 8], [2, 5], 0)
    assert common_ids(left, right) == 3
    assert works_of([left, right]) == {
        "seed": Work(2 + 6 + 2 + 5, 3 + 21 + 3 + 15),
        "all": Work(11, 36),
        "all, shared": Work(8, 21 + 15 - 6),
        "needed": Work(4, 6),
        "needed, shared": Work(2, 3),
    }
    assert read([3]) == Work(3, 6)
    assert read_pair(4, 3, 0) == Work(7, 16)
    shape = Shape(hidden=2, layers=1, heads=1, kv_heads=1, head_dim=2, intermediate=3, vocabulary=5)
    assert Work(3, 6).flops(shape) == 2 * 34 * 3 + 4 * 2 * 6


def test_the_seeds_time_for_all_follows_from_the_flops_of_its_share():
    shape = Shape(hidden=2, layers=1, heads=1, kv_heads=1, head_dim=2, intermediate=3, vocabulary=5)
    works = {"seed": Work(40, 80), "all": Work(10, 20), "all, shared": Work(5, 10)}
    works |= {"needed": Work(8, 9), "needed, shared": Work(8, 9)}
    found = Found(seconds={"seed": [1.0, 2.0], "all": [2.0, 3.0], "needed": [1.0, 1.0]})
    found.cpu_s |= {"seed": 5.0, "all": 4.0, "needed": 2.0}
    figures = figures_of(shape, 4, works, Work(20, 40), found, ceiling=100.0)
    assert figures.seconds["seed"] == [2.0, 4.0]
    assert figures.cpu_s == {"seed": 10.0, "all": 4.0, "needed": 2.0}
    assert (figures.ratio("all"), figures.ratio("needed")) == (1.2, 3.0)
    assert figures.matmul_share("all") == pytest.approx((2 * 34 * 5 + 8 * 10) / 5.0 / 100.0)
    assert isinstance(figures, Figures)


def rollout(prompt: str, sample: int) -> Rollout:
    return Rollout(prompt, sample, [], None, 0, 0, "complete", "")


def test_the_seeds_share_keeps_pairs_together():
    chunks = [
        Chunk("train", i, [], [rollout(p, sample) for p in prompts for sample in range(2)])
        for i, prompts in enumerate(["ab", "cd", "e"])
    ]
    keys = [item.key for item in seed_share(chunks, 2)]
    assert keys == [("a", 0), ("a", 1), ("c", 0), ("c", 1), ("e", 0), ("e", 1)]
    assert len(seed_share(chunks, 1)) == 10


def test_differences_are_told():
    seed = {("p", 0): [1.0, -4.0], ("p", 1): [0.5, 2.0]}
    alike = {("p", 0): [1.0, -4.0], ("p", 1): [0.5, 2.0], ("q", 0): [9.0, 9.0]}
    needed = {("p", 0): [None, -4.5], ("p", 1): [0.25, None]}
    assert differences({"seed": seed, "all": alike}) == (0.0, 0.0)
    assert differences({"seed": seed, "all": alike, "needed": needed}) == (0.5, 0.25)
    # All turns were asked for: a score that isn't there is no smaller difference.
    assert differences({"seed": seed, "all": alike | needed}) == (math.inf, math.inf)
