"""Log-probs of every row of a repo: sharded over ranks, packed, and journalled row by row."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from pipeline import columns, store
from pipeline.balance import Budget
from pipeline.columns import of_side
from pipeline.errors import DataError
from pipeline.microbatches import collate
from pipeline.packing import Example, Layout
from pipeline.records import FLOATS, FloatArray
from pipeline.training import my_batches

BLOCK = 1024
"""Rows between two synchronisations of the journal with the disk."""

Logprobs = dict[str, FloatArray]
"""Log-probs of an example by role, or of a row by side."""
Found = Mapping[tuple[str, int], Logprobs]
"""Log-probs by (split, row)."""


class Rows(Protocol):
    """What has rows to score: a sources.Source, or a repo."""

    def batches(
        self, split: str, columns: Sequence[str] | None = None, batch_rows: int = ...
    ) -> Iterator[pa.RecordBatch]:
        """Stream a split in order."""
        ...

    def num_rows(self, split: str) -> int:
        """Count the rows of a split, at most."""
        ...


@dataclass(frozen=True)
class Scorer:
    """Who computes log-probs: the prepared policy as it is now, and what one pass may hold."""

    accelerator: Any
    policy: Any
    budget: Budget


def scorer_of(config: Any, accelerator: Any, policy: Any, layout: Layout) -> Scorer:
    """Return a scorer with the budget that a LoadConfig gives passes without gradients."""
    budget = Budget(config.tokens(accelerator), config.per_device_eval_batch_size, layout)
    return Scorer(accelerator, policy, budget)


@torch.no_grad()
def logprobs(scorer: Scorer, examples: Sequence[Example]) -> Iterator[tuple[int, Logprobs]]:
    """Yield (index, log-probs by role) for this rank's share of the examples."""
    check_ids(scorer, examples)
    scorer.policy.eval()
    for indices, counted in my_batches(scorer.accelerator, examples, scorer.budget):
        held = [examples[i] for i in indices]
        batch = collate(held, scorer.budget.layout, scorer.accelerator.device, counted)
        logps_N = scorer.policy(*batch.inputs).cpu().numpy()
        if not counted:
            continue
        sizes = [int(s.mask.sum()) for example in held for s in example.strands.values()]
        parts = iter(np.split(logps_N, np.cumsum(sizes)[:-1]))
        for i in indices:
            yield i, {role: next(parts) for role in examples[i].strands}


def check_ids(scorer: Scorer, examples: Sequence[Example]) -> None:
    """Raise DataError, naming the prompt, for ids that aren't in the vocabulary, or none to score.

    On a GPU an id behind the embeddings would end the process without a word of which.
    """
    config = scorer.accelerator.unwrap_model(scorer.policy).config.get_text_config()
    for example in examples:
        for strand in example.strands.values():
            trained = np.flatnonzero(strand.mask)
            if not len(trained):
                raise DataError(f"prompt {example.prompt_id}: no id of a sequence trains")
            read = strand.ids[: trained[-1] + 1]
            if read.min() < 0 or read.max() >= config.vocab_size:
                raise DataError(
                    f"prompt {example.prompt_id} holds ids from {read.min()} to {read.max()}, and "
                    f"the model's vocabulary has {config.vocab_size}: it was tokenized for another "
                    "model"
                )


@dataclass(frozen=True)
class Column:
    """A column of log-probs to compute (`old_logprob`), of which rows and sides."""

    name: str
    rows: Rows
    sides: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        """The column of each side: `chosen_old_logprob`, or `old_logprob` for groups."""
        return {side: of_side(side, self.name) for side in self.sides}


def score_split(scorer: Scorer, run: store.Run, column: Column, split: str, done: Found) -> None:
    """Journal the log-probs of the rows that no earlier run has done.

    Call on every rank, with the same `done`: each scores its share of every block.
    """
    from tqdm import tqdm

    accelerator, first = scorer.accelerator, 0
    journal = run.journal(f"journal-{accelerator.process_index:05d}")
    off = not accelerator.is_main_process
    total = column.rows.num_rows(split)
    with tqdm(total=total, desc=f"{column.name} ({split})", unit="row", disable=off) as bar:
        for batch in column.rows.batches(split, read_columns(column.sides), BLOCK):
            rest = unscored(batch, column, split, first, done)
            for k, found in logprobs(scorer, [example for _, example in rest]) if rest else ():
                for row, values in by_row(column.sides, rest[k][0], found):
                    journal.append({"split": split, "row": row} | encoded(column, values))
            journal.sync()
            first += batch.num_rows
            bar.update(batch.num_rows)
    journal.close()


def read_columns(sides: Sequence[str]) -> list[str]:
    """Name the columns that scoring reads."""
    return ["prompt_id", *columns.side_columns(sides)]


def unscored(
    batch: pa.RecordBatch, column: Column, split: str, first: int, done: Found
) -> list[tuple[int, Example]]:
    """Return the batch's examples that have a row without log-probs, each with its first row."""
    rest = []
    for example in columns.examples(batch, column.sides, {}):
        rows = len(example.strands) // len(column.sides)
        if any((split, row) not in done for row in range(first, first + rows)):
            rest.append((first, example))
        first += rows
    return rest


def by_row(sides: Sequence[str], first: int, found: Logprobs) -> Iterator[tuple[int, Logprobs]]:
    """Give the log-probs of an example to its rows: a pair is one, a group one for each member."""
    values, width = list(found.values()), len(sides)
    for k in range(len(values) // width):
        yield first + k, dict(zip(sides, values[k * width : (k + 1) * width], strict=True))


def encoded(column: Column, values: Logprobs) -> dict[str, str]:
    """Write float32 values as base64 of their little-endian bytes: exact, and short."""
    return {
        name: base64.b64encode(values[side].astype("<f4").tobytes()).decode()
        for side, name in column.names.items()
    }


def journalled(run: store.Run, column: Column) -> dict[tuple[str, int], Logprobs]:
    """Read what all ranks have journalled of a column."""
    return {
        (record["split"], record["row"]): {
            side: np.frombuffer(base64.b64decode(record[name]), dtype="<f4")
            for side, name in column.names.items()
        }
        for record in run.journals()
        if all(name in record for name in column.names.values())
    }


def with_column(
    batches: Iterator[pa.RecordBatch], column: Column, split: str, found: Found
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a split with their log-probs, in the place of any they had."""
    first = 0
    for batch in batches:
        rows = range(first, first + batch.num_rows)
        for side, name in column.names.items():
            values = pa.array([found[split, row][side] for row in rows], type=FLOATS)
            if name in batch.schema.names:
                batch = batch.drop_columns([name])
            batch = batch.append_column(name, values)
        first += batch.num_rows
        yield batch
