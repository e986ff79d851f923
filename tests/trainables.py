"""A tiny policy folder and pairs repos with known contents, for the tests of training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import records, store
from pipeline.packing import Example, Strand
from pipeline.records import Member, PairExample, Segment, Span, TrainingSequence
from pipeline.rows import group_row, pair_row
from pipeline.tiny import make_tokenizer

# Tensors this small gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Made:
    """Stands for the config of the stage that would have written a test's repo."""

    rows: int
    seed: int


def tokenizer() -> Any:
    return make_tokenizer(["a guess, higher, lower, correct"], 280, 256)


def tiny_model(seed: int = 0, tie: bool = True) -> Any:
    from pipeline.models import tiny_llama

    made = tiny_llama(
        tokenizer(),
        seed=seed,
        hidden_size=32,
        layers=2,
        heads=2,
        max_positions=256,
        tie_embeddings=tie,
    )
    return made.eval()


def policy_folder(folder: Path, seed: int = 0) -> str:
    from pipeline.models import untied, write_folder

    model = tiny_model(seed)
    write_folder(model, untied(model, model.state_dict()), tokenizer(), folder, torch.float32)
    return str(folder)


def sequence(rng: np.random.Generator, prefix: np.ndarray, response: int) -> TrainingSequence:
    ids = np.concatenate([prefix, rng.integers(5, 250, response)]).astype(np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[len(prefix) :] = 1
    segments = [Segment(0, len(ids), 0)]
    return TrainingSequence(ids, mask, segments, [Span(0, len(prefix), len(ids))])


def pair(rng: np.random.Generator, i: int) -> PairExample:
    prefix = rng.integers(5, 250, int(rng.integers(3, 30)))
    chosen, reject = (
        Member(k, [], sequence(rng, prefix, int(rng.integers(1, 12))), float(rng.random()))
        for k in range(2)
    )
    return PairExample(f"p{i:03d}", 0, 0, chosen, reject, len(prefix))


def pairs(count: int, seed: int = 0) -> list[PairExample]:
    rng = np.random.default_rng(seed)
    return [pair(rng, i) for i in range(count)]


def examples(count: int, seed: int = 0) -> list[Example]:
    """Return pairs as training reads them, with old log-probs of -1 everywhere."""
    return [
        Example(
            one.prompt_id,
            {
                side: strand(member)
                for side, member in zip(SIDES, (one.chosen, one.reject), strict=True)
            },
        )
        for one in pairs(count, seed)
    ]


SIDES = ("chosen", "reject")


def strand(member: Member) -> Strand:
    s = member.sequence
    old = np.full(int(s.mask.sum()), -1.0, dtype=np.float32)
    return Strand(s.ids, s.mask, s.segments, member.reward, {"old_logprob": old})


def pairs_repo(folder: Path, train: int = 12, test: int = 0, seed: int = 0) -> str:
    """Write a repo of pairs; return its name."""
    name = str(folder)
    run = store.begin("tokenize_masks", "pairs", Made(train, seed), name)
    made = pairs(train + test, seed)
    splits = {"train": made[:train], "test": made[train:]}
    run.write(
        {split: table(rows) for split, rows in splits.items() if rows},
        counts={"rows_in": len(made)},
    )
    return name


def table(rows: list[PairExample]) -> pa.Table:
    return pa.Table.from_pylist([pair_row(row) for row in rows], schema=records.PAIRS)


def groups_repo(folder: Path, train: int = 10, seed: int = 0) -> str:
    """Write a repo of groups without advantages; return its name."""
    name = str(folder)
    run = store.begin("tokenize_masks", "groups", Made(train, seed), name)
    rows = [
        group_row(records.GroupExample(one.prompt_id, 0, one.chosen.sequence, None, None))
        for one in pairs(train, seed)
    ]
    run.write(
        {"train": pa.Table.from_pylist(rows, schema=records.GROUPS)}, counts={"rows_in": train}
    )
    return name


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
