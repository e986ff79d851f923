"""Which policy turns of a pair train: masks made anew from the spans of the turns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import PAIR_SIDES, of_side, offsets, structs
from pipeline.errors import DataError

TURNS = ("mask", "all", "forked")
"""The repo's own mask; every policy turn up to the score turn; the turn at which a pair parts."""

Spans = Sequence[tuple[int, int, int]]
"""(turn, start, end) of the policy turns in a sequence."""


def read_columns(turns: str) -> list[str]:
    """Name the columns that `retrained` reads."""
    if turns == "mask":
        return []
    sides = [of_side(side, name) for side in PAIR_SIDES for name in ("mask", "spans")]
    needed = ["branch_turn"] if turns == "forked" else ["score_turn", *PAIR_SIDES]
    return ["prompt_id", *sides, *needed]


def retrained(batch: pa.RecordBatch, turns: str) -> pa.RecordBatch:
    """Return pairs with the masks of the turns that train.

    Raises DataError where a sequence doesn't hold all of these turns.
    """
    if turns == "mask":
        return batch
    for side in PAIR_SIDES:
        name = of_side(side, "mask")
        spans = structs(batch.column(of_side(side, "spans")), ("turn", "start", "end"))
        rows = all_spans(batch, side, spans) if turns == "all" else forked_spans(batch, spans)
        masks = masks_like(batch.column(name), rows)
        batch = batch.set_column(batch.schema.get_field_index(name), name, masks)
    return batch


def masks_like(masks: pa.Array, rows: Sequence[Spans]) -> pa.Array:
    """Return masks of the same lengths and type: 1 inside of each row's spans."""
    starts = offsets(masks)
    values = np.zeros(starts[-1], dtype=np.uint8)
    for first, spans in zip(starts, rows, strict=False):
        for _, start, end in spans:
            values[first + start : first + end] = 1
    made = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values))
    return made.cast(masks.type)


def forked_spans(batch: pa.RecordBatch, rows: Sequence[Spans]) -> Sequence[Spans]:
    """Keep each row's span of the turn at which its pair parts."""
    kept: list[Spans] = []
    names = batch.column("prompt_id").to_pylist()
    for name, turn, spans in zip(names, batch.column("branch_turn").to_pylist(), rows, strict=True):
        if turn is None:
            raise DataError(
                f"the rollouts of prompt {name} share only the prompt, so no turn of theirs is a "
                "fork: use --turns all"
            )
        kept.append([span for span in spans if span[0] == turn])
        if not kept[-1]:
            raise DataError(
                f"the sequence of prompt {name} doesn't hold turn {turn}, at which its pair parts: "
                "make the pairs again with stages/tokenize_masks.py --mask forked"
            )
    return kept


def all_spans(batch: pa.RecordBatch, side: str, rows: Sequence[Spans]) -> Sequence[Spans]:
    """Return the spans. DataError unless each row has every policy turn up to its score turn."""
    names = batch.column("prompt_id").to_pylist()
    for name, last, spans in zip(names, score_turns(batch, side), rows, strict=True):
        if [turn for turn, _, _ in spans] != list(range(last + 1)):
            held = ", ".join(str(turn) for turn, _, _ in spans) or "none"
            raise DataError(
                f"the {side} sequence of prompt {name} holds the policy turns {held} (counted from "
                f"0), and --turns all trains every turn up to turn {last}"
            )
    return rows


def score_turns(batch: pa.RecordBatch, side: str) -> list[Any]:
    """Return the score turn of each row's side.

    `score_turn` is that of the chosen rollout. The messages of both end with their score turn and
    open alike, so that the reject's is as many turns later as it has more answers.
    """
    answers = {one: answers_of(batch.column(one)) for one in ("chosen", side)}
    later = answers[side] - answers["chosen"]
    return (batch.column("score_turn").to_numpy(zero_copy_only=False) + later).tolist()


def answers_of(messages: pa.Array) -> Any:
    """Count the assistant's messages of each dialogue."""
    spoken = pc.equal(pc.struct_field(messages.flatten(), "role"), "assistant")
    before = np.concatenate([[0], np.cumsum(spoken.to_numpy(zero_copy_only=False))])
    return np.diff(before[offsets(messages)])
