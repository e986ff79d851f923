"""Rollouts of a repo -> columns of pairs or groups: batches of ids at once, text row by row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.bulk import Selection, prompts_of, select
from pipeline.compat import refuel_pairs
from pipeline.prompt_batches import whole_prompts
from pipeline.ragged import Bools
from pipeline.records import GROUPS, PAIRS, PairExample, Rollout
from pipeline.repos import Repo
from pipeline.rows import group_row, pair_row, rollout_from_row
from pipeline.selection import Dropped, Rules, select_group, select_pairs

SCHEMAS = {"pairs": PAIRS, "groups": GROUPS}
Choose: TypeAlias = Callable[[Sequence[Rollout], Rules], tuple[Sequence[Any], list[Dropped]]]


@dataclass(frozen=True)
class Sifted:
    """What became of some rows of the input: how many they were, what is kept, what is dropped."""

    rows_in: int
    kept: pa.RecordBatch
    dropped: list[Dropped]


def sift(source: Repo, split: str, kind: str, rules: Rules) -> Iterator[Sifted]:
    """Select from the rollouts of a split, prompt after prompt."""
    rewarded = kind == "pairs" or rules.advantages != "none"
    for batch in whole_prompts(source, split, rewarded):
        found = select_any(batch, kind, rules)
        yield Sifted(batch.num_rows, found.rows, [row for _, row in found.dropped])


def select_any(batch: pa.RecordBatch, kind: str, rules: Rules) -> Selection:
    """Select from whole prompts; one with a rollout of text is encoded, and goes row by row."""
    if rules.compat != "none":
        return select_records(batch, kind, rules)
    texts = pc.is_null(batch.column("turns")).to_numpy(zero_copy_only=False)
    if not texts.any():
        return select(batch, kind, rules)
    prompts = prompts_of(batch)
    of_text = np.bincount(prompts, texts)[prompts] > 0
    written = _renumbered(
        select_records(batch.filter(pa.array(of_text)), kind, rules), of_text, prompts
    )
    if of_text.all():
        return written
    played = _renumbered(select(batch.filter(pa.array(~of_text)), kind, rules), ~of_text, prompts)
    return _merged(written, played)


def _renumbered(found: Selection, part: Bools, prompts: Any) -> Selection:
    """Number prompts as the whole batch does."""
    numbers = np.unique(prompts[part])
    dropped = [(int(numbers[number]), row) for number, row in found.dropped]
    return Selection(found.rows, numbers[found.prompts], dropped)


def _merged(left: Selection, right: Selection) -> Selection:
    numbers = np.concatenate([left.prompts, right.prompts])
    order = np.argsort(numbers, kind="stable")
    rows = pa.concat_batches([left.rows, right.rows]).take(pa.array(order))
    dropped = sorted(left.dropped + right.dropped, key=lambda entry: entry[0])
    return Selection(rows, numbers[order], dropped)


def select_records(batch: pa.RecordBatch, kind: str, rules: Rules) -> Selection:
    """Select prompt by prompt, in records instead of columns."""
    prompts = prompts_of(batch)
    rollouts = [rollout_from_row(row) for row in batch.to_pylist()]
    if any(rollout.turns is None for rollout in rollouts):
        rules.ahead(rollouts)
    kept, numbers, dropped = list[Any](), list[int](), list[tuple[int, Dropped]]()
    choose = chooser(kind, rules)
    for number in range(int(prompts[-1]) + 1):
        members = np.flatnonzero(prompts == number).tolist()
        examples, left = choose([rollouts[i] for i in members], rules)
        kept += examples
        numbers += [number] * len(examples)
        dropped += [(number, row) for row in left]
    return Selection(rows_of(kept, kind), np.array(numbers, dtype=np.int64), dropped)


def chooser(kind: str, rules: Rules) -> Choose:
    """Return what makes pairs or groups of a prompt's rollouts, by our rules or REFUEL's."""
    if kind == "groups":
        return select_group
    return refuel_pairs if rules.compat == "refuel" else select_pairs


def rows_of(examples: Sequence[Any], kind: str) -> pa.RecordBatch:
    """Return examples as columns."""
    rows = [pair_row(e) if isinstance(e, PairExample) else group_row(e) for e in examples]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMAS[kind])
