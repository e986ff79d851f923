"""The ways that bench/tokenize.py times: our stage, the seed's script, the tokenizer alone."""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from _seed_tokenize import MAX_LENGTH, SeedTokenize
from _stage import watch

from pipeline.records import Rollout

STAGE = Path(__file__).parents[1] / "stages" / "tokenize_masks.py"
SIDES = ("chosen", "reject")


@dataclass(frozen=True)
class SeedRun:
    """What the seed's way took, and what it wrote: ids and masks by prompt, unpadded."""

    seconds: float
    rows_in: int
    rows: dict[str, dict[str, list[int]]]
    parquet_bytes: int
    arrow_bytes: int


@cache
def stage() -> ModuleType:
    """Load our stage, which isn't in a package."""
    spec = importlib.util.spec_from_file_location("stage_tokenize_masks", STAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_ours(source: Path, out: Path, test_size: int, tokenizer: str = "") -> float:
    """Run the stage's main from a ranked repo to a finished pairs repo; return the seconds."""
    module = stage()
    config = module.Config(
        input_repo=str(source),
        output_repo=str(out),
        max_length=MAX_LENGTH,
        test_size=test_size,
        tokenizer=tokenizer,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its report
        started = time.perf_counter()
        module.main(config)
        return time.perf_counter() - started


def run_seed(
    seed: SeedTokenize, table: pa.Table, work: Path, test_size: int, measured: bool = True
) -> SeedRun:
    """Run the seed's way on a table; what it wrote is measured afterwards, where that is asked."""
    work.mkdir(parents=True)
    source = work / "ranked.parquet"
    pq.write_table(table, source)
    started = time.perf_counter()
    split, prompts = seed.run(source, work, test_size)
    seconds = time.perf_counter() - started
    if not measured:
        return SeedRun(seconds, table.num_rows, {}, 0, 0)
    split.save_to_disk(work / "arrow")
    return SeedRun(
        seconds,
        table.num_rows,
        _unpadded(split, prompts, seed.pad),
        sum(path.stat().st_size for path in work.glob("t*.parquet")),
        sum(path.stat().st_size for path in (work / "arrow").rglob("*.arrow")),
    )


def _unpadded(split: Any, prompts: Sequence[str], pad: int) -> dict[str, dict[str, list[int]]]:
    """Return the rows by prompt: the split has shuffled them, so the first message tells them."""
    found = {}
    for part in split.values():
        for row in part:
            values = {}
            for side in SIDES:
                ids = row[f"{side}_token"]
                length = ids.index(pad) if pad in ids else len(ids)
                values[f"{side}_token"] = ids[:length]
                values[f"{side}_mask"] = row[f"{side}_mask"][:length]
            found[row["chosen"][0]["content"]] = values
    assert len(found) == len(prompts), "every prompt opens in its own words"
    return found


def our_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Read a pairs repo's rows by the first message of their prompts."""
    names = ["chosen", *(f"{side}_{name}" for side in SIDES for name in ("token", "mask"))]
    found = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        for row in pq.read_table(path, columns=[*names, "prompt_id"]).to_pylist():
            found[row["chosen"][0]["content"]] = row
    return found


def bytes_of(folder: Path) -> int:
    """Return the size of a repo's data."""
    return sum(path.stat().st_size for path in (folder / "data").iterdir())


def rendered(rollouts: Sequence[Rollout], tokenizer: Any) -> list[str]:
    """Render what trains: each dialogue through the turn at which it parts."""
    pages = []
    for rollout in rollouts:
        assert rollout.branch_turn is not None
        messages = rollout.messages[: 2 * (rollout.branch_turn + 1)]
        pages.append(tokenizer.apply_chat_template(messages, tokenize=False))
    return pages


def run_tokenizer(pages: Sequence[str], tokenizer: Any) -> float:
    """Encode pages and do nothing else; return the seconds."""
    started = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(list(pages), add_special_tokens=False)
    return time.perf_counter() - started


def peak_rss_mb(source: Path, work: Path) -> tuple[float, float]:
    """Run the stage as a user does; return its peak memory in MB, and its seconds."""
    flags = [f"--input_repo={source}", f"--output_repo={work / 'out'}", "--test_size=500"]
    log = work / "stage.log"
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(STAGE), *flags], stdout=file, stderr=file, env=dict(os.environ)
        )
        peak, _ = watch(process)
    assert process.returncode == 0, re.sub(r"\r", "\n", log.read_text())[-3000:]
    return peak, time.perf_counter() - started
