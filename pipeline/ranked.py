"""Write a ranked repo: the input's rows in their order, each with what the journals say of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline import store
from pipeline.rankable import rollouts_of
from pipeline.records import RANKED
from pipeline.rewards.summary import Summary
from pipeline.rewards.telling import extra, pictures, tables
from pipeline.rows import rollout_row
from pipeline.scoring import Records, ranked_windows


def write_ranked(
    output: store.Run,
    prompts: store.Repo,
    columns: Sequence[str],
    records: Records,
    reward_model: tuple[str, str],
) -> Summary:
    """Write the repo and return what its rewards come to.

    `reward_model`: (name, fingerprint). `columns`: those of dialogues in REFUEL's layout.
    """
    total = Summary()
    by_split = {split: Summary() for split in prompts.splits()}
    name = "@".join(reward_model)
    splits = {
        split: _batches(
            ranked_windows(rollouts_of(prompts, split, columns), split, records, name),
            (total, summary),
        )
        for split, summary in by_split.items()
    }
    # The store reads these after the rows, which fill them as they pass: one pass, flat memory.
    told: dict[str, dict[str, Any]] = {"counts": {}, "extra": {}, "pictures": {}, "card": {}}
    last = prompts.splits()[-1]
    splits[last] = _then(splits[last], lambda: _tell(reward_model[0], total, by_split, told))
    output.write(
        splits,
        counts=told["counts"],
        extra=told["extra"],
        pictures=told["pictures"],
        card=told["card"],
    )
    return total


def _batches(
    windows: Iterator[list[Any]], summaries: Sequence[Summary]
) -> Iterator[pa.RecordBatch]:
    for window in windows:
        for summary in summaries:
            for rollout in window:
                summary.add(rollout)
        yield pa.RecordBatch.from_pylist([rollout_row(item) for item in window], schema=RANKED)
    for summary in summaries:
        summary.close_prompt()


def _then(
    batches: Iterator[pa.RecordBatch], finish: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    yield from batches
    finish()


def _tell(
    name: str,
    total: Summary,
    by_split: Mapping[str, Summary],
    told: dict[str, dict[str, Any]],
) -> None:
    splits = by_split if len(by_split) > 1 else {}
    told["counts"].update(total.counts())
    told["extra"].update(extra(total, splits))
    told["card"].update(tables=tables(total, splits))
    told["pictures"].update(pictures(name, total))
