"""Measure what bench/tokenize.py tells, and check that ours and the seed's rows agree."""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import describe
from _seed_tokenize import SeedTokenize
from _tokenize_dialogues import (
    Speech,
    ranked,
    repeated,
    sampled,
    seed_rows,
    write,
    write_batches,
)
from _tokenize_ways import (
    SIDES,
    SeedRun,
    bytes_of,
    our_rows,
    peak_rss_mb,
    rendered,
    run_ours,
    run_seed,
    run_tokenizer,
)


@dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: int = 3000
    """Prompts; each has two rollouts of full dialogues."""
    turns: int = 5
    """Policy turns of a dialogue; the seed's script knows no other number."""
    dialogue_ids: int = 1000
    """Ids of a dialogue, on average."""
    vocabulary: int = 32_000
    """Of the tokenizer, which is trained here."""
    seed_pairs: int = 300
    """Prompts that the seed's script is timed on: half of them, all, and half again."""
    memory_rollouts: int = 200_000
    """Rollouts of the run whose memory is measured; 0 leaves it out."""
    seed: int = 0
    """Of the dialogues."""


@dataclass(frozen=True)
class Times:
    """Seconds for all pairs."""

    ids: float
    text: float
    tokenizer: float
    seed: float


def main(config: Config) -> None:
    """Measure, print the figures and one line of JSON."""
    # Set before the first batch: the tokenizers library would warn of the processes started later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets

    datasets.disable_progress_bars()
    libraries = ("pyarrow", "tokenizers", "transformers", "datasets")
    print(describe("cpu", libraries), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(config, Path(temporary))
    print(json.dumps(result), flush=True)


def measure(config: Config, work: Path) -> dict[str, float]:
    """Return the figures of the last line."""
    language = Speech(config.vocabulary, config.turns, config.dialogue_ids, config.seed)
    language.tokenizer.save_pretrained(work / "tokenizer")
    text = ranked(language, config.pairs)
    ids = sampled(text, language.tokenizer, config.seed)
    table = write(work / "ids", ids)
    write(work / "text", text)
    told = sum(len(t.prompt_ids) + len(t.response_ids) for r in ids for t in r.turns or [])
    spoken = sum(len(message["content"] or "") for r in ids for message in r.messages)
    print(f"{told / len(ids):.0f} ids of {spoken / told:.1f} characters a dialogue", flush=True)

    pages = rendered(text, language.tokenizer)
    times, seed = take_turns(config, text, work, lambda: run_tokenizer(pages, language.tokenizer))
    print_times(config, times)
    agree(our_rows(work / "out-text"), seed.rows, "text")
    agree(our_rows(work / "out-ids"), seed.rows, "ids")
    sizes = size_ratios(work, seed)
    result = {
        "ids_vs_seed": round(times.seed / times.ids, 1),
        "text_vs_seed": round(times.seed / times.text, 1),
        "text_vs_tokenizer": round(times.text / times.tokenizer, 2),
        **sizes,
    }
    if config.memory_rollouts:
        result["peak_rss_mb_200k"] = memory(config, table, work)
    return result


def take_turns(
    config: Config, text: list[Any], work: Path, tokenizer: Callable[[], float]
) -> tuple[Times, SeedRun]:
    """Time every way three times, by turns, after a run that doesn't count; return the medians.

    The seed's script gets half of its rows, all of them, and half again: what it takes for every
    row follows from the three, and is right where it is linear.
    """
    seed, some = SeedTokenize(work / "tokenizer"), min(config.seed_pairs, config.pairs)
    run_seed(seed, seed_rows(text[:16]), work / "seed-warm", 2, measured=False)
    ours = {"ids": "", "text": str(work / "tokenizer")}
    for name, folder in ours.items():
        time_ours(config, work, name, folder)
    tokenizer()
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, "tokenizer")}
    runs = []
    for i, count in enumerate((some // 2, some, some // 2)):
        rows, out = seed_rows(text[: 2 * count]), work / f"seed-{i}"
        runs.append(run_seed(seed, rows, out, max(count // 10, 1), measured=count == some))
        for name, folder in ours.items():
            seconds[name].append(time_ours(config, work, name, folder))
        seconds["tokenizer"].append(tokenizer())
    rates = [run.rows_in / run.seconds for run in runs]
    told = ", ".join(
        f"{run.rows_in} rows: {rate:.1f} rows/s" for run, rate in zip(runs, rates, strict=True)
    )
    print(f"the seed's way, {told}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Times(**medians, seed=config.pairs / statistics.median(rates)), runs[1]


def time_ours(config: Config, work: Path, name: str, tokenizer: str) -> float:
    """Return the seconds of our stage, from repo to repo."""
    shutil.rmtree(work / f"out-{name}", ignore_errors=True)
    return run_ours(work / name, work / f"out-{name}", max(config.pairs // 10, 1), tokenizer)


def print_times(config: Config, times: Times) -> None:
    """Print a table of the ways."""
    print("| way | seconds | rows/s |\n|---|---:|---:|")
    for name, seconds in [
        ("ours, from sampled ids", times.ids),
        ("ours, from text", times.text),
        ("the tokenizer alone, the pages that train", times.tokenizer),
        ("the seed's script, from its rate", times.seed),
    ]:
        print(f"| {name} | {seconds:.2f} | {config.pairs / seconds:.0f} |", flush=True)


def agree(ours: Mapping[str, Any], seed: Mapping[str, Any], name: str) -> dict[str, int]:
    """Compare the rows that both keep, print what differs and why; return the counts.

    Raises AssertionError for a difference without a reason.
    """
    both = ours.keys() & seed.keys()
    counts = dict.fromkeys(("same", "end_of_turn", "order"), 0)
    for key in both:
        counts[_difference(ours[key], seed[key])] += 1
    print(
        f"from {name}: {len(both)} of the seed's {len(seed)} rows are kept by both; "
        f"{counts['same']} are the same; {counts['end_of_turn']} lack the end of a turn that was "
        "cut, which the seed's template adds",
        flush=True,
    )
    assert counts["order"] == 0, "another side is chosen"
    return counts


def _difference(ours: Mapping[str, Any], seed: Mapping[str, Any]) -> str:
    names = [f"{side}_{part}" for side in SIDES for part in ("token", "mask")]
    if all(ours[name] == seed[name] for name in names):
        return "same"
    for side in SIDES:
        more = seed[f"{side}_token"][: len(ours[f"{side}_token"])]
        if more != ours[f"{side}_token"]:
            return "order"
        if len(seed[f"{side}_token"]) - len(more) > 1:
            return "order"
    return "end_of_turn"


def size_ratios(work: Path, seed: SeedRun) -> dict[str, float]:
    """Compare bytes a row: the seed's Arrow files, which its trainer loads, and its parquet."""
    rows, kept = len(our_rows(work / "out-ids")), len(seed.rows)
    ours = bytes_of(work / "out-ids") / rows
    text = bytes_of(work / "out-text") / rows
    print(
        f"bytes a row: ours {ours:.0f} with the log-probs of sampling, {text:.0f} from text; the "
        f"seed's {seed.arrow_bytes / kept:.0f} as Arrow, which its trainer loads, "
        f"{seed.parquet_bytes / kept:.0f} as parquet",
        flush=True,
    )
    return {
        "bytes_vs_seed": round(seed.arrow_bytes / kept / ours, 1),
        "bytes_vs_seed_parquet": round(seed.parquet_bytes / kept / ours, 2),
    }


def memory(config: Config, table: Any, work: Path) -> float:
    """Return the stage's peak memory in MB on many rollouts, which are the same ones again."""
    rows = config.memory_rollouts
    write_batches(work / "many", repeated(table, rows), rows)
    (work / "stage").mkdir()
    peak, seconds = peak_rss_mb(work / "many", work / "stage")
    print(f"{rows} rollouts, as a command: {seconds:.1f} s, {peak:.0f} MB at the peak", flush=True)
    return round(peak)
