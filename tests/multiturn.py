"""Repos of several turns with known ids: pairs, groups, and the published REFUEL layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import records, store
from pipeline.records import GroupExample, Member, PairExample, Segment, Span, TrainingSequence
from pipeline.rows import group_row, pair_row
from tests.trainables import Made

PAD = 128256


def turn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return what the user says and what the policy answers, as ids."""
    return rng.integers(5, 250, int(rng.integers(2, 6))), rng.integers(
        5, 250, int(rng.integers(1, 5))
    )


def played(turns: list[tuple[np.ndarray, np.ndarray]], trained: set[int]) -> TrainingSequence:
    """Join turns into one segment, with the spans of the answers and the mask of the trained."""
    ids, mask, spans = np.empty(0, np.int32), np.empty(0, np.uint8), []
    for t, (said, answered) in enumerate(turns):
        start = len(ids) + len(said)
        spans.append(Span(t, start, start + len(answered)))
        ids = np.concatenate([ids, said, answered]).astype(np.int32)
        more = np.repeat([0, int(t in trained)], [len(said), len(answered)])
        mask = np.concatenate([mask, more]).astype(np.uint8)
    return TrainingSequence(ids, mask, [Segment(0, len(ids), 0)], spans)


def messages(turns: int) -> list[Any]:
    return [
        {"role": role, "content": f"{role} {t}"}
        for t in range(turns)
        for role in ("user", "assistant")
    ]


def pair(i: int, mask: str, fork: int = 1, scored: int = 2, seed: int = 0) -> PairExample:
    """Return two rollouts of three turns that part at the second one.

    `mask` is tokenize_masks' --mask: `forked` sequences end with the fork.
    """
    rng = np.random.default_rng([seed, i])
    shared = [turn(rng) for _ in range(fork)]
    asked, _ = turn(rng)
    members = []
    for k in range(2):
        answers = [(asked, turn(rng)[1]), *(turn(rng) for _ in range(scored - fork))]
        turns = [*shared, *answers]
        trained = {"all": set(range(scored + 1)), "forked": {fork}, "last": {scored}}[mask]
        sequence = played(turns[: max(trained) + 1], trained)
        members.append(Member(k, messages(scored + 1), sequence, float(rng.normal())))
    chosen, reject = members
    prefix = sum(len(part) for said in shared for part in said) + len(asked)
    return PairExample(f"p{i:03d}", fork, scored, chosen, reject, prefix)


def pairs_repo(folder: Path, mask: str, train: int = 6, test: int = 2, **options: Any) -> str:
    made = [pair(i, mask, **options) for i in range(train + test)]
    return write(folder, "pairs", {"train": made[:train], "test": made[train:]})


def write(folder: Path, kind: str, splits: dict[str, list[Any]]) -> str:
    to_row, schema = (pair_row, records.PAIRS) if kind == "pairs" else (group_row, records.GROUPS)
    run = store.begin("tokenize_masks", kind, Made(len(splits["train"]), 0), str(folder))
    tables = {
        split: pa.Table.from_pylist([to_row(row) for row in rows], schema=schema)
        for split, rows in splits.items()
        if rows
    }
    run.write(tables, counts={"rows_in": sum(map(len, splits.values()))})
    return str(folder)


def groups_repo(folder: Path, sizes: tuple[int, ...] = (3, 1, 4)) -> str:
    """Write groups of these sizes, whose rollouts share their first turn."""
    rng, rows = np.random.default_rng(0), []
    for g, size in enumerate(sizes):
        shared = [(rng.integers(5, 250, 30), rng.integers(5, 250, 4))]
        for k in range(size):
            sequence = played([*shared, turn(rng)], {0, 1})
            rows.append(GroupExample(f"g{g}", k, sequence, float(k), None))
    return write(folder, "groups", {"train": rows})


def published_row(chosen: list[int], reject: list[int], width: int = 2048) -> dict[str, Any]:
    """Return a row of the published REFUEL datasets that parts at its second turn.

    Ids of the common context are [1, 2, 3]; the trained ones are the given. The dialogues are one
    turn longer than what trains.
    """
    opening = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    row: dict[str, Any] = {"chosen_reward": 0.5, "reject_reward": 0.25, "chosen_logprob": -3.0}
    row["reject_logprob"] = -4.0
    for side, ids in (("chosen", chosen), ("reject", reject)):
        row[side] = [*opening, said("assistant", side), said("user", "d"), said("assistant", "e")]
        row[f"{side}_token"] = [1, 2, 3, *ids] + [PAD] * (width - 3 - len(ids))
        row[f"{side}_mask"] = [0, 0, 0] + [1] * len(ids) + [0] * (width - 3 - len(ids))
    return row


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def published_repo(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write a published dataset: parquet of int64 columns, a train split only, no manifest."""
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    return str(folder)
