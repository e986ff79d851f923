"""Every promise about a finished output, broken once: the stage must stop and name the row."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from multiturn import pair
from pipeline import store
from pipeline.checks import checker
from pipeline.errors import DataError
from pipeline.records import GROUPS, PAIRS, GroupExample, PairExample, Segment, Span
from pipeline.rows import group_row, pair_row
from small_repos import Config as RepoConfig

Shards = Mapping[str, Sequence[Path]]


def pairs() -> list[PairExample]:
    """Six sound pairs of three turns, all of which train; the fourth has log-probs."""
    made = [pair(i, "all") for i in range(6)]
    for member in (made[3].chosen, made[3].reject):
        trained = int(member.sequence.mask.sum())
        member.sample_logprob = -np.ones(trained, np.float32)
    return made


def groups() -> list[GroupExample]:
    sequences = [one.chosen.sequence for one in pairs()]
    return [
        GroupExample(f"g{i // 2}", i % 2, s, 0.5, np.full(int(s.mask.sum()), 0.25, np.float32))
        for i, s in enumerate(sequences)
    ]


def table(examples: Sequence[PairExample] | Sequence[GroupExample]) -> pa.Table:
    if isinstance(examples[0], PairExample):
        return pa.Table.from_pylist([pair_row(e) for e in examples], schema=PAIRS)  # type: ignore[arg-type]
    return pa.Table.from_pylist([group_row(e) for e in examples], schema=GROUPS)  # type: ignore[arg-type]


def published(
    folder: Path, kind: str, splits: Mapping[str, pa.Table], vocabulary: int = 0
) -> store.Repo:
    """Write these rows, sound or not, as a stage would."""
    run = store.begin("tokenize_masks", kind, RepoConfig(), str(folder), seed=7)
    rows = sum(t.num_rows for t in splits.values())
    return run.write(splits, counts={}, check=checker(kind, rows, vocabulary))


def refused(folder: Path, kind: str, rows: Any, **options: Any) -> str:
    """Return why a split of these rows is refused; nothing may be published then."""
    with pytest.raises(DataError) as caught:
        published(folder, kind, {"train": rows}, **options)
    assert not (folder / "turnwise.json").exists()
    assert not (folder / "README.md").exists()
    return str(caught.value)


def test_sound_pairs_and_groups_pass(tmp_path: Path) -> None:
    repo = published(tmp_path / "p", "pairs", {"train": table(pairs())}, vocabulary=250)
    assert repo.num_rows() == 6
    repo = published(tmp_path / "g", "groups", {"train": table(groups())}, vocabulary=250)
    assert repo.num_rows() == 6


def empty_mask(one: PairExample) -> None:
    one.reject.sequence.mask[:] = 0


def first_trains(one: PairExample) -> None:
    for member in (one.chosen, one.reject):
        member.sequence.mask[0] = 1
        member.sequence.spans[0].start = 0
    one.prefix_length = 0


def unsampled(one: PairExample) -> None:
    one.chosen.sequence.mask[one.chosen.sequence.spans[-1].start - 1] = 1


def two(one: PairExample) -> None:
    one.chosen.sequence.mask[one.chosen.sequence.spans[-1].start] = 2


def negative(one: PairExample) -> None:
    one.chosen.sequence.ids[-1] = -3


def unknown_id(one: PairExample) -> None:
    one.reject.sequence.ids[-1] = 250


def other_prefix(one: PairExample) -> None:
    one.reject.sequence.ids[0] += 1


def long_prefix(one: PairExample) -> None:
    one.prefix_length = 1000


def other_prefix_mask(one: PairExample) -> None:
    span = one.reject.sequence.spans[0]
    one.reject.sequence.mask[span.start : span.end] = 0
    one.reject.sample_logprob = None


def overlapping(one: PairExample) -> None:
    one.chosen.sequence.spans[1] = Span(1, one.chosen.sequence.spans[0].end - 1, 10**6)


def early_turn(one: PairExample) -> None:
    one.chosen.sequence.spans[1].turn = 0


def gap(one: PairExample) -> None:
    size = len(one.chosen.sequence.ids)
    one.chosen.sequence.segments[:] = [Segment(0, 2, 0), Segment(3, size - 2, 2)]


def short_segments(one: PairExample) -> None:
    one.reject.sequence.segments[0].length -= 1


def greedy(one: PairExample) -> None:
    size = len(one.chosen.sequence.ids)
    one.chosen.sequence.segments[:] = [Segment(0, 2, 0), Segment(2, size - 2, 3)]


def few_numbers(one: PairExample) -> None:
    one.chosen.sample_logprob = np.zeros(1, np.float32)


def no_number(one: PairExample) -> None:
    trained = int(one.reject.sequence.mask.sum())
    one.reject.sample_logprob = np.full(trained, np.nan, np.float32)


def odd_mask(one: PairExample) -> None:
    one.chosen.sequence.mask = one.chosen.sequence.mask[:-1]


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        (odd_mask, "(chosen): the mask hasn't an entry for each id"),
        (empty_mask, "(reject): no id trains"),
        (first_trains, "(chosen): the first id trains"),
        (unsampled, "(chosen): an id trains that was not sampled"),
        (two, "(chosen): a mask is neither 0 nor 1"),
        (negative, "(chosen): an id is outside of a vocabulary of 250"),
        (unknown_id, "(reject): an id is outside of a vocabulary of 250"),
        (other_prefix, ": the two don't begin with the same ids and masks"),
        (long_prefix, ": the two don't begin with the same ids and masks"),
        (other_prefix_mask, ": the two don't begin with the same ids and masks"),
        (overlapping, "(chosen): spans overlap, or aren't within the ids"),
        (early_turn, "(chosen): spans overlap"),
        (gap, "(chosen): the segments don't tile the ids"),
        (short_segments, "(reject): the segments don't tile the ids"),
        (greedy, "(chosen): a segment keeps more ids than came before it"),
        (few_numbers, "(chosen): chosen_sample_logprob hasn't a finite number"),
        (no_number, "(reject): reject_sample_logprob hasn't a finite number"),
    ],
)
def test_a_broken_promise_names_the_row(
    tmp_path: Path, breaks: Callable[[PairExample], None], told: str
) -> None:
    examples = pairs()
    breaks(examples[3])
    found = refused(tmp_path / "out", "pairs", table(examples), vocabulary=250)
    name = "prompt p003, samples 0 and 1"
    assert re.match(rf"{name} ?{re.escape(told)}", found), found


def test_groups_are_checked_as_well(tmp_path: Path) -> None:
    examples = groups()
    examples[4].advantage = np.zeros(1, np.float32)
    found = refused(tmp_path / "out", "groups", table(examples))
    assert "prompt g2, sample 0: advantage hasn't a finite number for each trained id" in found


def test_wrong_types_are_refused(tmp_path: Path) -> None:
    rows = table(pairs())
    at = rows.schema.get_field_index("chosen_token")
    wide = rows.column("chosen_token").cast(pa.list_(pa.int64()))
    found = refused(tmp_path / "out", "pairs", rows.set_column(at, "chosen_token", wide))
    assert "hasn't the columns and types" in found


def test_keys_are_unique_over_all_shards(tmp_path: Path) -> None:
    examples = pairs()
    found = refused(tmp_path / "out", "pairs", table([*examples, examples[2]]))
    assert "a key occurs 2 times" in found
    assert "p002" in found


def test_no_prompt_is_in_two_splits(tmp_path: Path) -> None:
    examples = groups()
    splits = {"train": table(examples[:3]), "test": table(examples[3:])}
    with pytest.raises(DataError, match="prompt g1 is in the split 'test' and in another one"):
        published(tmp_path / "out", "groups", splits)


def test_every_kept_row_is_there(tmp_path: Path) -> None:
    run = store.begin("tokenize_masks", "pairs", RepoConfig(), str(tmp_path / "out"), seed=7)
    with pytest.raises(DataError, match="6 rows were written where 7 were kept"):
        run.write({"train": table(pairs())}, counts={}, check=checker("pairs", 7))


def test_what_is_checked_is_what_the_disk_holds(tmp_path: Path) -> None:
    """A shard that changes between writing and checking doesn't pass."""
    sound = checker("pairs", 6)

    def damaged(shards: Shards) -> None:
        examples = pairs()
        examples[5].chosen.sequence.ids[-1] = -1
        pq.write_table(table(examples), shards["train"][0])
        sound(shards)

    run = store.begin("tokenize_masks", "pairs", RepoConfig(), str(tmp_path / "out"), seed=7)
    with pytest.raises(DataError, match=r"p005.*\(chosen\): an id is outside of any vocabulary"):
        run.write({"train": table(pairs())}, counts={}, check=damaged)
    assert not (tmp_path / "out" / "turnwise.json").exists()
