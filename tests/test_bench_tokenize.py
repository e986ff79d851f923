"""bench/tokenize.py in small: it runs, it compares like with like, and hides no library."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

BENCH = Path(__file__).parents[1] / "bench"
# A benchmark's own modules lie beside it, as they do when it is run by its file.
sys.path.append(str(BENCH))

from _seed_tokenize import MAX_LENGTH, SeedTokenize  # noqa: E402 - found by the path above
from _tokenize_dialogues import Speech, ranked, repeated, sampled, seed_rows  # noqa: E402
from _tokenize_measure import agree  # noqa: E402 - as above
from _tokenize_ways import rendered  # noqa: E402 - as above

SCRIPTS = sorted(BENCH.glob("[a-z]*.py"))


# bench/tokenize.py and the standard library's module of that name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_starts(script):
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--seed" in done.stdout or "--threads" in done.stdout


@pytest.mark.parametrize("first", ["tokenize", "linecache", "inspect", "torch"])
def test_scripts_of_this_folder_get_the_standard_librarys_tokenize(tmp_path, first):
    """The folder is first on the path, as for `python bench/X.py`; so it is where one stands."""
    program = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import {first}, tokenize, io; "
        "print(tokenize.__file__, tokenize.__spec__.origin, sep='\\n'); "
        "print(len(list(tokenize.generate_tokens(io.StringIO('a = 1').readline))))"
    )
    for folder in (tmp_path, BENCH):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder
        )
        file, origin, tokens = done.stdout.splitlines()
        assert Path(file).parent != BENCH
        assert (file, tokens) == (origin, "5")


# The whole


def test_it_runs_and_ours_and_the_seeds_rows_agree():
    sizes = "--pairs 60 --seed_pairs 30 --dialogue_ids 200 --vocabulary 3000 --memory_rollouts 300"
    command = [sys.executable, str(BENCH / "tokenize.py"), *sizes.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    ratios = {"ids_vs_seed", "text_vs_seed", "text_vs_tokenizer", "bytes_vs_seed"}
    assert set(result) == ratios | {"bytes_vs_seed_parquet", "peak_rss_mb_200k"}
    assert all(result[name] > 0 for name in result)
    assert result["bytes_vs_seed"] > 5
    assert 50 < result["peak_rss_mb_200k"] < 3000
    both, kept, same, cut = (
        re.search(
            r"from text: (\d+) of the seed's (\d+) rows are kept by both; (\d+) are the same; "
            r"(\d+) lack",
            done.stdout,
        )
        or pytest.fail(done.stdout)
    ).groups()
    assert int(both) == int(same) > 0.8 * int(kept)
    assert cut == "0"


# What is compared


@pytest.fixture(scope="module")
def language():
    return Speech(3000, turns=5, dialogue_ids=300, seed=3)


@pytest.fixture(scope="module")
def text(language):
    return ranked(language, 60)


def test_sampled_ids_are_the_templates_but_for_ends_of_cut_turns(language, text):
    ids = sampled(text, language.tokenizer, 0)
    end, lengths, cut = language.tokenizer.eos_token_id, [], 0
    for rollout in ids:
        page = language.tokenizer.apply_chat_template(rollout.messages, return_dict=False)
        seen = []
        for turn in rollout.turns:
            assert turn.keep == len(seen)
            seen += turn.prompt_ids + turn.response_ids
            assert (turn.response_ids[-1] == end) == (turn.finish_reason == "stop")
            assert len(turn.logprobs) == len(turn.response_ids)
            cut += turn.finish_reason == "length"
        last_cut = rollout.turns[-1].finish_reason == "length"
        assert seen == page[: len(page) - last_cut]
        lengths.append(len(page))
    assert np.mean(lengths) == pytest.approx(300, rel=0.15)
    assert 0 < cut < 0.1 * 5 * len(ids)


def test_the_seeds_rows_by_hand(tmp_path, language, text):
    language.tokenizer.save_pretrained(tmp_path)
    seed = SeedTokenize(tmp_path)
    (row,) = seed_rows(text[:2]).to_pylist()
    at, last = row["sampled_h_from_sampled_len"], row["sampled_len_from_5"]
    assert (at, last) == (text[0].branch_turn, text[0].score_turn)
    columns = seed.columns([row])
    assert len(columns) == 20
    found = seed.choose(row, 0, columns)
    better = int(text[1].rewards[last] >= text[0].rewards[last])
    chosen = text[better].messages
    page = language.tokenizer.apply_chat_template(chosen[: 2 * at + 2], return_dict=False)
    assert found["chosen"] == chosen[: 2 * last + 2]
    assert found["chosen_reward"] == text[better].rewards[last]
    assert found["chosen_token"].tolist() == page + [seed.pad] * (MAX_LENGTH - len(page))
    answer = [id_ for id_, m in zip(page, found["chosen_mask"], strict=False) if m]
    said = chosen[2 * at + 1]["content"]
    assert language.tokenizer.decode(answer) == said + "<|eot_id|>"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"trajectory_reward": [-99999, 0, 0, 0, 0]}, False),
        ({"trajectory_sampled_h_from_sampled_len_reward": [0, 0, 0, 0, -99999]}, False),
        ({"trajectory_sampled_h_from_sampled_len": "trajectory"}, False),
        ({"long": 9}, False),
    ],
)
def test_the_seeds_filters(tmp_path, language, text, change, kept):
    language.tokenizer.save_pretrained(tmp_path)
    pair = next(pair for pair in zip(text[::2], text[1::2], strict=True) if no_gaps(pair))
    (row,) = seed_rows(pair).to_pylist()
    for name, value in change.items():
        if name == "long":  # a turn after the one that trains counts in the first dialogue
            row["trajectory"][value] = {"role": "assistant", "content": "word " * 4000}
        else:
            row[name] = row[value] if isinstance(value, str) else value
    assert SeedTokenize(tmp_path).keeps(row) == kept


def no_gaps(pair):
    return all(reward > -99999 for rollout in pair for reward in rollout.rewards)


def test_the_tokenizer_alone_reads_what_trains(language, text):
    pages = rendered(text[:2], language.tokenizer)
    for page, rollout in zip(pages, text, strict=False):
        assert page.count("<|eot_id|>") == 2 * (rollout.branch_turn + 1)
        assert page.endswith(
            rollout.messages[2 * rollout.branch_turn + 1]["content"] + "<|eot_id|>"
        )


def test_a_repeated_table_has_new_prompts_and_the_rows_asked_for():
    table = pa.table({"prompt_id": ["a", "a", "b", "b"], "sample": [0, 1, 0, 1]})
    batches = list(repeated(table, 10))
    names = [name for batch in batches for name in batch.column("prompt_id").to_pylist()]
    assert names == [f"{k:04d}-{name}" for k in range(3) for name in "aabb"][:10]
    assert names == sorted(names)


def row(chosen, reject, **changes):
    masks = {"chosen_mask": [0] * len(chosen), "reject_mask": [0] * len(reject)}
    return {"chosen_token": chosen, "reject_token": reject, **masks, **changes}


def test_only_the_end_of_a_cut_turn_may_differ():
    seed = {"a": row([1, 2, 9], [1, 3, 9]), "b": row([1], [2]), "c": row([1], [2])}
    ours = {"a": row([1, 2], [1, 3, 9]), "b": row([1], [2]), "d": row([5], [6])}
    assert agree(ours, seed, "ids") == {"same": 1, "end_of_turn": 1, "order": 0}
    for wrong in (row([1, 3, 9], [1, 2, 9]), row([1], [1, 3, 9])):
        with pytest.raises(AssertionError, match="another side"):
            agree({"a": wrong}, seed, "ids")
