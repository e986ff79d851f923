"""The policy's log-probs from before training, kept beside the pairs: `{query_dataset}_{cluster}`.

The repo holds the pairs' columns and `chosen_old_logprob`, `reject_old_logprob`: a float32 for each
masked id. Its key says what the numbers depend on; when anything of it differs they are computed
anew, the reason is printed, and the finished repo takes the old one's place.
"""

import base64
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import columns, manifest, store
from pipeline.balance import Budget
from pipeline.claims import claim_output, describe_job, say
from pipeline.errors import DataError
from pipeline.packing import Example, collate
from pipeline.records import FLOATS, FloatArray
from pipeline.repos import WORK, Repo, RepoName, open_folder, parse_repo
from pipeline.seeds import generator_for
from pipeline.training import my_batches

OLD = {"old_logprob": "old_logprob"}
DRIFT_GATE = 1.05
DRIFT_ROWS = 64
BLOCK = 1024
"""Examples between two synchronisations of the journal with the disk."""

Logprobs = dict[str, FloatArray]


@dataclass(frozen=True)
class Key:
    """What log-probs depend on, besides the pairs and the model's weights."""

    tokenizer: str
    template: str
    temperature: float
    dtype: str
    attn_implementation: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """Who computes log-probs: the prepared policy as it is now, and what one pass may hold."""

    accelerator: Any
    policy: Any
    budget: Budget


@dataclass(frozen=True)
class Place:
    """Where log-probs are kept, and the job that would write them."""

    name: RepoName
    folder: Path
    job: Any


def key_of(tokenizer: Any, temperature: float, dtype: str, attn_implementation: str) -> Key:
    """Return the key of log-probs made here and now."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return Key(hashes[0], hashes[1], temperature, dtype, attn_implementation, versions)


def cluster_repo(query_dataset: str, cluster: str) -> str:
    """Name the repo of a cluster tag; a revision of the pairs is part of its key, not its name."""
    text = query_dataset.rstrip("/").split("@")[0]
    return f"{text}_{cluster}"


def place_of(name: RepoName, pairs: Repo, key: Key, base_model: str, fingerprint: str) -> Place:
    """Say where log-probs of these pairs under this key and this model are kept."""
    models = {"base_model": fingerprint}
    job = describe_job("logprobs", "logprobs", name.text, key, [pairs], models, None)
    job.models["base_model"]["name"] = base_model
    return Place(name, name.folder, job)


def cluster_place(
    query_dataset: str, cluster: str, pairs: Repo, key: Key, model: tuple[str, str]
) -> Place:
    """Return the place of a cluster tag; `model` is (name, fingerprint)."""
    return place_of(parse_repo(cluster_repo(query_dataset, cluster)), pairs, key, *model)


def scratch_place(work: Path, pairs: Repo, key: Key, model: tuple[str, str]) -> Place:
    """Return a place in a stage's work folder: without a cluster tag log-probs aren't kept."""
    folder = (work / "old_logprobs").absolute()
    return place_of(RepoName(str(folder), None, folder, None), pairs, key, *model)


def old_logprobs(scorer: Scorer, place: Place, pairs: Repo) -> Repo:
    """Return the pairs with old log-probs: reused where key and drift allow it, computed otherwise.

    Call on every rank, before the first optimizer step. Raises DataError where the place holds
    something else; an unreachable Hub is an error, never a cache miss.
    """
    held = manifest.read_json(place.folder / manifest.MANIFEST)
    if held is None and place.folder.exists() and any(place.folder.iterdir()):
        raise DataError(f"{place.folder} holds something else; choose another --task.cluster")
    if held is not None:
        reason = stale(held, place) or drifted(scorer, place)
        if reason is None:
            say(f"old log-probs: reused from {place.name.text}")
            return open_folder(place.name.text, place.folder)
        say(f"old log-probs: computed anew, because of {reason}")
    return compute(scorer, place, pairs)


def stale(held: Mapping[str, Any], place: Place) -> str | None:
    """Say what of the key differs, or None. Raises DataError if this isn't a log-prob repo."""
    if held.get("kind") != "logprobs":
        raise DataError(
            f"{place.folder} is a repo of kind {held.get('kind')!r}, no cache of log-probs: "
            "choose another --task.cluster"
        )
    differing = manifest.differences(held["identity"], place.job.identity)
    return None if not differing else "; ".join(differing)


def drifted(scorer: Scorer, place: Place) -> str | None:
    """Recompute a sample of rows; say how far they drifted when that is past the gate.

    The gate is mean over masked ids of exp|Δlogp| <= 1.05.
    """
    repo = open_folder(place.name.text, place.folder)
    split = repo.splits()[0]
    kept = columns.pairs(repo.batches(split, [*wanted(), *old_columns()]), OLD)
    order = generator_for(0, repo.content_hash, 0, 0, "drift").permutation(len(kept))
    sample = [kept[i] for i in sorted(order[:DRIFT_ROWS])]
    gaps = [
        np.abs(new[side] - sample[i].strands[side].numbers["old_logprob"])
        for i, new in logprobs(scorer, sample)
        for side in new
    ]
    total = np.array([sum(np.exp(g).sum() for g in gaps), sum(map(len, gaps))], dtype=np.float64)
    summed = scorer.accelerator.reduce(
        torch.from_numpy(total).to(scorer.accelerator.device), reduction="sum"
    )
    mean = float(summed[0] / summed[1])
    if mean <= DRIFT_GATE:
        return None
    return f"a drift of {mean:.3f} (mean exp|Δlogp| of {len(sample)} rows; the gate is 1.05)"


def wanted() -> list[str]:
    """Name the columns of pairs that log-probs and training read."""
    return ["prompt_id", *columns.side_columns(columns.PAIR_SIDES)]


def old_columns() -> list[str]:
    """Name the columns that this module adds."""
    return [f"{side}_{column}" for side in columns.PAIR_SIDES for column in OLD.values()]


@torch.no_grad()
def logprobs(scorer: Scorer, examples: Sequence[Example]) -> Iterator[tuple[int, Logprobs]]:
    """Yield (index, log-probs by role) for this rank's share of the examples."""
    scorer.policy.eval()
    for indices, counted in my_batches(scorer.accelerator, examples, scorer.budget):
        held = [examples[i] for i in indices]
        batch = collate(held, scorer.budget.layout, scorer.accelerator.device, counted)
        logps_N = scorer.policy(*batch.inputs).cpu().numpy()
        if not counted:
            continue
        sizes = [int(s.mask.sum()) for i in indices for s in examples[i].strands.values()]
        parts = iter(np.split(logps_N, np.cumsum(sizes)[:-1]))
        for i in indices:
            yield i, {role: next(parts) for role in examples[i].strands}


def compute(scorer: Scorer, place: Place, pairs: Repo) -> Repo:
    """Compute log-probs sharded over ranks, resumable, and put the finished repo in its place."""
    building = place.folder.with_name(place.folder.name + ".new")
    accelerator = scorer.accelerator
    if accelerator.is_main_process:
        discard_other(building, place)
    accelerator.wait_for_everyone()
    name = RepoName(place.name.text, None, building, None)
    claim = claim_output(place.job, building, building / WORK, "--task.cluster")
    run = store.Run(name, claim)
    if not run.finished:
        done = journalled(run)
        # No rank may append before all have read, or they would plan different rests.
        accelerator.wait_for_everyone()
        for split in pairs.splits():
            examples = columns.pairs(pairs.batches(split, wanted()), {})
            score_split(scorer, run, split, examples, done)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not run.finished:
            found = journalled(run)
            splits = {split: with_logprobs(pairs, split, found) for split in pairs.splits()}
            run.write(splits, counts={"rows_in": sum(map(pairs.num_rows, pairs.splits()))})
        replace(building, place.folder)
    accelerator.wait_for_everyone()
    return open_folder(place.name.text, place.folder)


def discard_other(building: Path, place: Place) -> None:
    """Remove a half-made cache of another key: nothing can finish it."""
    state = manifest.read_json(building / WORK / "run.json")
    state = state or manifest.read_json(building / manifest.MANIFEST)
    if state is not None and state["config_hash"] != place.job.config_hash:
        shutil.rmtree(building)


def replace(building: Path, folder: Path) -> None:
    """Put a finished repo where another may lie; a kill in between leaves the new one findable."""
    stale_folder = folder.with_name(folder.name + ".stale")
    shutil.rmtree(stale_folder, ignore_errors=True)
    if folder.exists():
        os.replace(folder, stale_folder)
    os.replace(building, folder)
    shutil.rmtree(stale_folder, ignore_errors=True)


def score_split(
    scorer: Scorer,
    run: store.Run,
    split: str,
    examples: Sequence[Example],
    done: Mapping[tuple[str, int], Logprobs],
) -> None:
    """Journal the log-probs of the rows that no earlier run has done."""
    from tqdm import tqdm

    accelerator = scorer.accelerator
    rest = [i for i in range(len(examples)) if (split, i) not in done]
    journal = run.journal(f"journal-{accelerator.process_index:05d}")
    off = not accelerator.is_main_process
    with tqdm(total=len(rest), desc=f"old log-probs ({split})", unit="pair", disable=off) as bar:
        for block in (rest[i : i + BLOCK] for i in range(0, len(rest), BLOCK)):
            for k, found in logprobs(scorer, [examples[i] for i in block]):
                journal.append({"split": split, "row": block[k]} | encoded(found))
            journal.sync()
            bar.update(len(block))
    journal.close()


def encoded(found: Logprobs) -> dict[str, str]:
    """Write float32 values as base64 of their little-endian bytes: exact, and short."""
    return {
        role: base64.b64encode(values.astype("<f4").tobytes()).decode()
        for role, values in found.items()
    }


def journalled(run: store.Run) -> dict[tuple[str, int], Logprobs]:
    """Read what all ranks have journalled."""
    return {
        (record.pop("split"), record.pop("row")): {
            role: np.frombuffer(base64.b64decode(text), dtype="<f4")
            for role, text in record.items()
        }
        for record in run.journals()
    }


def with_logprobs(
    pairs: Repo, split: str, found: Mapping[tuple[str, int], Logprobs]
) -> Iterator[pa.RecordBatch]:
    """Yield the pairs of a split with their old log-probs."""
    row = 0
    for batch in pairs.batches(split):
        rows = range(row, row + batch.num_rows)
        for side in columns.PAIR_SIDES:
            values = pa.array([found[split, i][side] for i in rows], type=FLOATS)
            batch = batch.append_column(f"{side}_old_logprob", values)
        row += batch.num_rows
        yield batch
