"""Rows of text that others wrote -> columns of pairs or groups."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.rendering import NOT_UNICODE
from pipeline.repos import Repo
from pipeline.selection import Dropped, Rules
from pipeline.sifting import Sifted, chooser, rows_of
from pipeline.text_rows import Row, reader_of, text_rollouts

BATCH_ROWS = 512


def sift_texts(source: Repo, split: str, kind: str, rules: Rules) -> Iterator[Sifted]:
    """Select from the rows of a split, each a prompt of its own. DataError: see reader_of."""
    read, columns = reader_of(source.columns(split), kind, source.name)
    texts = text_rollouts(_rows(source.batches(split, columns, BATCH_ROWS)), read)
    choose = chooser(kind, rules)
    while some := list(islice(texts, BATCH_ROWS)):
        rules.ahead([rollout for rollouts, _ in some for rollout in rollouts])
        kept, dropped = list[Any](), list[Dropped]()
        for rollouts, left_out in some:
            examples, more = choose(rollouts, rules) if rollouts else ([], [])
            kept += examples
            dropped += [*left_out, *more]
        yield Sifted(len(some), rows_of(kept, kind), dropped)


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row | RowError]:
    for batch in batches:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # Arrow takes any bytes for text; the other rows are sound
            yield from map(_row, (batch.slice(i, 1) for i in range(batch.num_rows)))


def _row(batch: pa.RecordBatch) -> Row | RowError:
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return RowError(NOT_UNICODE, str(error))
    return row
