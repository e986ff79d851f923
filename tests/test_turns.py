"""Which turns train: masks made anew from spans, and the rows that can't give them."""

from pathlib import Path

import numpy as np
import pytest

from pipeline import store
from pipeline.columns import ragged
from pipeline.errors import DataError
from pipeline.sources import open_pairs, open_source
from tests import multiturn


def trained(name: str, turns: str, side: str = "chosen") -> list[list[int]]:
    """Return the trained ids of each row."""
    names = [f"{side}_token", f"{side}_mask"]
    return [
        ids[mask == 1].tolist()
        for batch in open_pairs(name, turns).batches("train", names)
        for ids, mask in zip(*(ragged(batch.column(n)) for n in names), strict=True)
    ]


def answers(i: int, side: str, turns: set[int]) -> list[int]:
    sequence = getattr(multiturn.pair(i, "all"), side).sequence
    spans = [span for span in sequence.spans if span.turn in turns]
    return np.concatenate([sequence.ids[s.start : s.end] for s in spans]).tolist()


#            turn 0      turn 1 (the fork)      turn 2 (the score turn)
@pytest.mark.parametrize(
    ("mask", "turns", "expected"),
    [
        ("all", "mask", {0, 1, 2}),
        ("all", "all", {0, 1, 2}),
        ("all", "forked", {1}),
        ("last", "mask", {2}),
        ("last", "all", {0, 1, 2}),
        ("last", "forked", {1}),
        ("forked", "mask", {1}),
        ("forked", "forked", {1}),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "reject"])
def test_a_mask_is_made_of_the_spans_of_its_turns(
    tmp_path: Path, mask: str, turns: str, expected: set[int], side: str
) -> None:
    name = multiturn.pairs_repo(tmp_path / "pairs", mask)

    assert trained(name, turns, side) == [answers(i, side, expected) for i in range(6)]


@pytest.mark.parametrize(
    ("mask", "turns", "settled"),
    [("all", "all", "mask"), ("forked", "forked", "mask"), ("last", "all", "all")],
)
def test_turns_that_change_no_mask_are_those_of_the_mask(
    tmp_path: Path, mask: str, turns: str, settled: str
) -> None:
    assert open_pairs(multiturn.pairs_repo(tmp_path / "p", mask), turns).turns == settled


def test_all_turns_of_sequences_that_end_at_the_fork_are_refused(tmp_path: Path) -> None:
    name = multiturn.pairs_repo(tmp_path / "pairs", "forked")

    with pytest.raises(DataError) as caught:
        open_pairs(name, "all")

    assert "the chosen sequence of prompt p000 holds the policy turns 0, 1" in str(caught.value)
    assert "every turn up to turn 2" in str(caught.value)
    assert f"stages/tokenize_masks.py --input_repo RANKED_REPO --output_repo {name}_all" in str(
        caught.value
    )


def test_all_turns_where_every_fork_is_the_score_turn(tmp_path: Path) -> None:
    name = multiturn.pairs_repo(tmp_path / "pairs", "forked", fork=1, scored=1)

    assert open_pairs(name, "all").turns == "all"
    assert [len(ids) for ids in trained(name, "all")] == [
        sum(s.end - s.start for s in multiturn.pair(i, "all", scored=1).chosen.sequence.spans)
        for i in range(6)
    ]


def test_a_rejected_rollout_that_goes_on_after_its_sequence_is_found(tmp_path: Path) -> None:
    # The chosen dialogue ended at the fork; the rejected one has a turn more, which isn't here.
    pair = multiturn.pair(0, "forked", fork=1, scored=1)
    pair.reject.messages = multiturn.messages(3)
    name = multiturn.write(tmp_path / "pairs", "pairs", {"train": [pair]})

    with pytest.raises(DataError, match=r"the reject sequence of prompt p000 .* up to turn 2"):
        open_pairs(name, "all")


def test_a_row_of_the_last_split_is_looked_at_too(tmp_path: Path) -> None:
    splits = {"train": [multiturn.pair(0, "last")], "test": [multiturn.pair(1, "forked")]}
    name = multiturn.write(tmp_path / "pairs", "pairs", splits)

    with pytest.raises(DataError, match="the chosen sequence of prompt p001"):
        open_pairs(name, "all")


def test_pairs_without_a_fork_have_no_forked_turn(tmp_path: Path) -> None:
    pair = multiturn.pair(0, "all")
    pair.branch_turn = None
    name = multiturn.write(tmp_path / "pairs", "pairs", {"train": [pair]})

    with pytest.raises(DataError, match=r"share only the prompt.* use --turns all"):
        open_pairs(name, "forked")


def test_groups_keep_their_own_masks(tmp_path: Path) -> None:
    name = multiturn.groups_repo(tmp_path / "groups")

    assert open_source(name).sides == ("",)
    with pytest.raises(DataError, match="their own masks say what trains"):
        open_source(name, "all")
    with pytest.raises(DataError, match="holds groups; this trains on pairs"):
        open_pairs(name)


def test_what_is_neither_names_the_stage_that_makes_pairs(tmp_path: Path) -> None:
    name = multiturn.published_repo(tmp_path / "texts", [{"chosen": "a", "rejected": "b"}])

    with pytest.raises(DataError, match=r"'chosen_token' \(stages/tokenize_masks.py writes it\)"):
        open_pairs(name)


def test_training_needs_a_train_split(tmp_path: Path) -> None:
    run = store.begin("tokenize_masks", "pairs", multiturn.Made(1, 0), str(tmp_path / "pairs"))
    made = multiturn.pairs_repo(tmp_path / "other", "all", train=2, test=0)
    run.write({"held_out": store.open_repo(made).table()}, counts={"rows_in": 2})

    with pytest.raises(DataError, match="no split `train`; it has: held_out"):
        open_pairs(str(tmp_path / "pairs"))
