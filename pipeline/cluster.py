"""Log-probs from before training, kept beside their pairs or groups: `{query_dataset}_{cluster}`.

The repo holds the rows' own columns, `old_logprob` (of the policy) and `ref_logprob` (of the
reference), whichever was asked for: a float32 for each masked id, under `chosen_old_logprob` and so
on for pairs. The key of each column says what its numbers depend on. When anything of it differs
they are computed anew and the reason is printed; a finished repo takes the old one's place.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import columns, manifest, store
from pipeline.claims import Job, claim_output, describe_job, say
from pipeline.columns import of_side
from pipeline.errors import DataError
from pipeline.journal import read_journal
from pipeline.logprob_keys import (
    MASKS,
    MODELS,
    NAMES,
    Keys,
    Place,
    Wanted,
    differs,
    held_keys,
)
from pipeline.logprob_rows import (
    Column,
    Scorer,
    journalled,
    logprobs,
    read_columns,
    score_split,
    with_column,
)
from pipeline.packing import Example
from pipeline.repos import WORK, Repo, RepoName, open_folder
from pipeline.seeds import generator_for
from pipeline.sources import Source

DRIFT_GATE = 1.05
DRIFT_ROWS = 64


def fill(scorer: Scorer, place: Place, asked: Wanted) -> Repo:
    """Return the rows with a column of log-probs: reused where key and drift allow it, or computed.

    Other columns of the same rows and turns are kept. Call on every rank, before the first
    optimizer step. Raises DataError where the place holds something else.
    """
    recover(scorer.accelerator, place)
    keys, reason = held_keys(place)
    if asked.column in keys:
        reason = differs(keys[asked.column], asked.key) or drifted(scorer, place, asked.column)
        if reason is None:
            return reused(place, asked)
    if reason is not None:
        say(f"{NAMES[asked.column]}: computed anew, because of {reason}")
    others = {name: key for name, key in keys.items() if name != asked.column}
    return compute(scorer, place, asked, others)


def valid(place: Place, asked: Wanted) -> Repo | None:
    """Return the rows with a column of log-probs if its key is the one asked for, else None.

    Nothing is recomputed: for where the model can't be loaded.
    """
    keys, _ = held_keys(place)
    if asked.column not in keys or differs(keys[asked.column], asked.key):
        return None
    return reused(place, asked)


def reused(place: Place, asked: Wanted) -> Repo:
    """Open the repo of a place and say so."""
    repo = open_folder(place.name.text, place.folder)
    say(f"{NAMES[asked.column]}: reused from {place.name.text}")
    return told(repo)


def told(repo: Repo) -> Repo:
    """Say which rows were left out of a repo of log-probs; return it."""
    dropped = (repo.manifest or {}).get("dropped") or {}
    if dropped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        say(f"{sum(dropped.values())} rows are left out ({reasons})")
    return repo


def recover(accelerator: Any, place: Place) -> None:
    """Move a finished repo into its place where a kill came between the two moves of `replace`."""
    building = building_of(place)
    finished = (building / manifest.MANIFEST).exists()
    if accelerator.is_main_process and finished and not place.folder.exists():
        os.replace(building, place.folder)
    accelerator.wait_for_everyone()


def building_of(place: Place) -> Path:
    """Return the folder in which the next repo of a place is made."""
    return place.folder.with_name(place.folder.name + ".new")


def drifted(scorer: Scorer, place: Place, column: str) -> str | None:
    """Recompute a sample of rows; say how far they drifted when that is past the gate.

    The gate is mean over masked ids of exp|Δlogp| <= 1.05.
    """
    sample = sampled(open_folder(place.name.text, place.folder), place.source.sides, column)
    gaps = [
        np.abs(new[role] - sample[i].strands[role].numbers[column])
        for i, new in logprobs(scorer, sample)
        for role in new
    ]
    total = np.array([sum(np.exp(g).sum() for g in gaps), sum(map(len, gaps))], dtype=np.float64)
    summed = scorer.accelerator.reduce(
        torch.from_numpy(total).to(scorer.accelerator.device), reduction="sum"
    )
    mean = float(summed[0] / summed[1])
    if mean <= DRIFT_GATE:
        return None
    return f"a drift of {mean:.3f} (mean exp|Δlogp| of {len(sample)} rows; the gate is 1.05)"


def sampled(repo: Repo, sides: Sequence[str], column: str) -> list[Example]:
    """Return examples of some rows of the first split, the same for everyone, in flat memory."""
    split, first, found = repo.splits()[0], 0, list[Example]()
    order = generator_for(0, repo.content_hash, 0, 0, "drift").permutation(repo.num_rows(split))
    chosen = np.sort(order[:DRIFT_ROWS])
    for batch in repo.batches(split, [*read_columns(sides), *(of_side(s, column) for s in sides)]):
        here = chosen[(chosen >= first) & (chosen < first + batch.num_rows)] - first
        found += columns.examples(batch.take(pa.array(here)), sides, {column: column})
        first += batch.num_rows
    return found


def compute(scorer: Scorer, place: Place, asked: Wanted, others: Mapping[str, Any]) -> Repo:
    """Compute a column sharded over ranks, resumable, and put the finished repo in its place."""
    building, accelerator = building_of(place), scorer.accelerator
    job = describe(place, asked, others)
    if accelerator.is_main_process:
        discard_other(building, job)
    accelerator.wait_for_everyone()
    name = RepoName(place.name.text, None, building, None)
    run = store.Run(name, claim_output(job, building, building / WORK, "--task.cluster"))
    held = open_folder(place.name.text, place.folder) if others else None
    column = Column(asked.column, held or place.source, place.source.sides)
    if not run.finished:
        done = journalled(run, column)
        # No rank may append before all have read, or they would plan different rests.
        accelerator.wait_for_everyone()
        for split in place.source.splits():
            score_split(scorer, run, column, split, done)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not run.finished:
            write(run, column, held, place.source)
        replace(building, place.folder)
    accelerator.wait_for_everyone()
    return told(open_folder(place.name.text, place.folder))


def describe(place: Place, asked: Wanted, others: Mapping[str, Any]) -> Job:
    """Say what a repo will hold: a new column, and those that are kept."""
    keys = Keys({**others, asked.column: dataclasses.asdict(asked.key)})
    job = describe_job("logprobs", "logprobs", place.name.text, keys, [place.source.repo], {}, None)
    held = manifest.read_json(place.folder / manifest.MANIFEST) or {}
    for name in others:
        job.models[MODELS[name]] = held["models"][MODELS[name]]
    job.models[MODELS[asked.column]] = {"name": asked.model, "fingerprint": asked.key.model}
    return job


def write(run: store.Run, column: Column, held: Repo | None, source: Source) -> None:
    """Write the repo: the rows of the one that is there, with its columns, or of the source."""
    found = journalled(run, column)
    dropped: list[dict[str, Any]] = []

    def rows(split: str) -> Iterator[pa.RecordBatch]:
        if held is not None:
            return held.batches(split)
        return without_logprobs(source, split, dropped)

    if held is not None and (held.path / "dropped.jsonl").exists():
        dropped += read_journal(held.path / "dropped.jsonl")
    splits = source.splits()
    run.write(
        {split: with_column(rows(split), column, split, found) for split in splits},
        dropped=dropped,
        counts={"rows_in": sum(map(source.num_rows, splits))},
        card={"notes": [MASKS[source.turns]]},
    )


def without_logprobs(
    source: Source, split: str, dropped: list[dict[str, Any]]
) -> Iterator[pa.RecordBatch]:
    """Stream a source without the log-probs that it may hold already: their key isn't ours."""
    known = {of_side(side, column) for side in source.sides for column in MODELS}
    for batch in source.batches(split, dropped=dropped):
        yield batch.select([name for name in batch.schema.names if name not in known])


def discard_other(building: Path, job: Job) -> None:
    """Remove a half-made repo of other keys: nothing can finish it."""
    state = manifest.read_json(building / WORK / "run.json")
    state = state or manifest.read_json(building / manifest.MANIFEST)
    if state is None or state["config_hash"] == job.config_hash:
        return
    if (building / WORK).exists():
        refuse_live(building / WORK, job)
    shutil.rmtree(building)


def refuse_live(work: Path, job: Job) -> None:
    """Raise DataError where another process is writing there right now."""
    from filelock import FileLock, Timeout

    lock = FileLock(work / "lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            f"another process is writing {job.name} with other keys right now; wait for it, or "
            "choose another cluster tag"
        ) from error
    lock.release(force=True)


def replace(building: Path, folder: Path) -> None:
    """Put a finished repo where another may lie; a kill in between leaves the new one findable."""
    stale_folder = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale_folder, ignore_errors=True)
    if folder.exists():
        os.replace(folder, stale_folder)
    os.replace(building, folder)
    shutil.rmtree(stale_folder, ignore_errors=True)
