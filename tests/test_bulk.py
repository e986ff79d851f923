"""Selecting from a batch at once equals selecting prompt by prompt, whatever is wrong."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import defects
from pipeline.bulk import select
from pipeline.checks import checker
from pipeline.errors import DataError
from pipeline.examples import Encoder
from pipeline.records import GROUPS, PAIRS, RANKED, Rollout
from pipeline.rollout_arrays import typed
from pipeline.rows import group_row, pair_row, rollout_row
from pipeline.selection import Rules, select_group, select_pairs
from play import played

KEPT = {"pairs": (select_pairs, pair_row, PAIRS), "groups": (select_group, group_row, GROUPS)}
REASONS = {
    *("failed", "not_a_dialogue", "ended_before_fork", "no_reward", "truncated", "too_long"),
    *("empty_response", "missing_sibling", "neither_best_nor_worst", "different_prefix"),
    *("same_response", "tie"),
}


def no_encoder() -> Encoder:
    raise AssertionError("rows with ids need no chat template")


def batch_of(prompts: Sequence[Sequence[Rollout]]) -> pa.RecordBatch:
    ordered = [sorted(prompt, key=lambda rollout: rollout.sample) for prompt in prompts]
    rows = [rollout_row(rollout) for prompt in ordered for rollout in prompt]
    return typed(pa.RecordBatch.from_pylist(rows, schema=RANKED), "test")


def one_by_one(
    prompts: Sequence[Sequence[Rollout]], kind: str, rules: Rules
) -> tuple[pa.RecordBatch, list[tuple[int, dict[str, Any]]], list[int]]:
    chosen, row_of, schema = KEPT[kind]
    rows, dropped, numbers = [], [], []
    for number, prompt in enumerate(prompts):
        examples, left = chosen(prompt, rules)  # type: ignore[operator]
        rows += [row_of(example) for example in examples]  # type: ignore[operator]
        numbers += [number] * len(examples)
        dropped += [(number, row) for row in left]
    return pa.RecordBatch.from_pylist(rows, schema=schema), dropped, numbers


CASES = [
    ("pairs", mask, "none", truncated, ties)
    for mask in ("forked", "last", "all")
    for truncated, ties in [(False, False), (True, False), (False, True)]
] + [
    ("groups", mask, advantages, advantages == "centred", False)
    for mask in ("forked", "last", "all")
    for advantages in ("none", "normalised", "centred")
]


@pytest.mark.parametrize(("kind", "mask", "advantages", "truncated", "ties"), CASES)
def test_a_batch_gives_what_its_prompts_give(
    kind: str, mask: str, advantages: str, truncated: bool, ties: bool
) -> None:
    seen: Counter[str] = Counter()
    for fork, seed in ((True, 1), (False, 2)):
        if mask == "forked" and not fork:
            continue
        prompts = defects.prompts(seed, 400, fork)
        limit = 25 if mask == "all" else 16
        rules = Rules(mask, limit, no_encoder, advantages, truncated, ties)
        found = select(batch_of(prompts), kind, rules)
        rows, dropped, numbers = one_by_one(prompts, kind, rules)
        found.rows.validate(full=True)
        assert found.dropped == dropped
        assert found.prompts.tolist() == numbers
        for name in rows.schema.names:
            assert found.rows.column(name).equals(rows.column(name)), name
        assert found.rows.schema.equals(rows.schema)
        assert rows.num_rows > 30
        seen.update(row["reason"] for _, row in dropped)
    # Every reason that these rules know has happened.
    silent = {"truncated"} if not truncated else set()
    silent |= {"tie"} if ties else set()
    if kind == "groups":
        silent |= {"neither_best_nor_worst", "different_prefix", "same_response", "tie"}
        silent |= {"no_reward", "missing_sibling"} if advantages == "none" else set()
    assert set(seen) == REASONS - silent


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_of_a_few_prompts(size: int) -> None:
    prompts = defects.prompts(3, 150, True)
    rules = Rules("forked", 21, no_encoder)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        found = select(batch_of(some), "pairs", rules)
        rows, dropped, _ = one_by_one(some, "pairs", rules)
        assert found.rows.equals(rows)
        assert found.dropped == dropped


def test_a_missing_fork_is_an_error() -> None:
    with pytest.raises(DataError, match=r"prompt p0.* use --mask last or --mask all"):
        select(batch_of(defects.prompts(4, 5, False)), "pairs", Rules("forked", 21, no_encoder))


def test_a_prefix_ends_where_either_member_begins_to_train() -> None:
    # Both have lost turn 0, their fork: 10 11 21 5 7 12 22 [8] against 10 11 21 [5] [6].
    two = [
        played([[1], [5, 7], [8]], keeps=[0, 1, 5]),
        played([[1], [5, 6]], keeps=[0, 1], sample=1),
    ]
    rules = Rules("last", 21, no_encoder)
    row = select(batch_of([two]), "pairs", rules).rows.to_pylist()[0]
    assert row["chosen_token"] == [10, 11, 21, 5, 7, 12, 22, 8]
    assert row["reject_token"] == [10, 11, 21, 5, 6]
    assert row["prefix_length"] == 3
    swapped = [replace(two[0], rewards=[0.0, 0.0, -1.0]), two[1]]
    row = select(batch_of([swapped]), "pairs", rules).rows.to_pylist()[0]
    assert (row["reject_token"], row["prefix_length"]) == ([10, 11, 21, 5, 7, 12, 22, 8], 3)


@pytest.mark.parametrize("part", ["keep", "prompt_ids", "response_ids"])
def test_a_turn_of_which_a_part_is_null_is_no_dialogue(part: str) -> None:
    rows = [rollout_row(played([[1], [2]]))]
    rows[0]["turns"][1][part] = None
    batch = typed(pa.RecordBatch.from_pylist(rows, schema=RANKED), "test")
    rules = Rules("last", 21, no_encoder, "none")
    found = select(batch, "groups", rules)
    assert [row["reason"] for _, row in found.dropped] == ["not_a_dialogue"]
    assert found.rows.num_rows == 0


def test_a_fork_before_the_first_turn_is_no_dialogue() -> None:
    prompts = [[played([[1], [2]], branch_turn=-1)]]
    for found in (
        select(batch_of(prompts), "groups", Rules("forked", 21, no_encoder)).dropped,
        one_by_one(prompts, "groups", Rules("forked", 21, no_encoder))[1],
    ):
        assert [row["reason"] for _, row in found] == ["not_a_dialogue"]


def test_a_null_id_or_logprob_is_no_number(tmp_path: Path) -> None:
    """They can't be told from sound ones by a filter; the check of the output stops on them."""
    for part, told in [
        ("response_ids", "an id is outside"),
        ("logprobs", "hasn't a finite number"),
    ]:
        rows = [rollout_row(played([[1, 2]]))]
        rows[0]["turns"][0][part] = [1, None]
        batch = typed(pa.RecordBatch.from_pylist(rows, schema=RANKED), "test")
        found = select(batch, "groups", Rules("last", 21, no_encoder, "none"))
        path = tmp_path / f"{part}.parquet"
        pq.write_table(pa.Table.from_batches([found.rows]), path)
        with pytest.raises(DataError, match=f"prompt p, sample 0: .*{told}"):
            checker("groups", 1)({"train": [path]})
