"""Cards: the README.md of a repo or model, rendered from datasets_cards/<kind>.md."""

import html
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.manifest import redact_text, write_atomically
from pipeline.ragged import bounds_of, list_lengths, sums
from pipeline.records import NO_SCORE
from pipeline.shards import read_batches, read_schema
from pipeline.thoughts import spoken

TEMPLATES = Path(__file__).resolve().parent.parent / "datasets_cards"

_BARS = 12
_BAR_WIDTH = 40
_SAMPLES = 2
_SAMPLE_CHARS = 700
_SAMPLE_MESSAGES = 12
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
# Markup of Markdown that html.escape leaves alone, and what turns the reading direction.
_MARKUP = re.compile(r"[\\`*_{}\[\]()#|~!$\n\r]")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass
class Tally:
    """Count, mean and spread of a stream of scores (Welford), and how many rows had none."""

    scores: int = 0
    mean: float = 0.0
    squares: float = 0.0
    missing: int = 0

    def add(self, value: float) -> None:
        """Take one score, or NO_SCORE."""
        if value == NO_SCORE:
            self.missing += 1
            return
        self.scores += 1
        step = value - self.mean
        self.mean += step / self.scores
        self.squares += step * (value - self.mean)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; nan for fewer than two scores."""
        return math.sqrt(self.squares / (self.scores - 1)) if self.scores > 1 else math.nan


@dataclass
class Facts:
    """What a card tells of the rows, in memory that doesn't grow with them."""

    lengths: Counter[int] = field(default_factory=Counter)
    rewards: dict[int, Tally] = field(default_factory=dict)
    samples: list[list[dict[str, Any]]] = field(default_factory=list)


def write(
    folder: Path,
    manifest: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    card: Mapping[str, Any],
) -> None:
    """Write the pictures and README.md of a folder whose data files are in place."""
    for name, picture in pictures.items():
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / name).write_bytes(picture)
    text = render(folder, manifest, list(pictures), card)
    write_atomically(folder / "README.md", text.encode(errors="replace"))


def render(
    folder: Path, manifest: Mapping[str, Any], pictures: Sequence[str], card: Mapping[str, Any]
) -> str:
    """Return the card of a repo or model.

    `card` is what the stage adds: `license` and `language` (front matter), `notes` (paragraphs) and
    `tables` (each with `title`, `columns` and `rows`). All of it is shown as plain text.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # No autoescape: Markdown needs its own, which every value goes through by `plain` or `fenced`.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, fenced=fenced)
    facts = gather(folder, manifest)
    body = environment.get_template(f"{manifest['kind']}.md").render(
        manifest=manifest,
        card={"notes": [], "tables": [], **card},
        pictures=pictures,
        literal=json.dumps(manifest["name"]),
        rewards=sorted(facts.rewards.items()),
        histogram=histogram(facts.lengths),
        samples=[show_dialogue(messages) for messages in facts.samples],
    )
    return redact_text(front_matter(manifest, card) + "\n" + body.strip() + "\n")


def front_matter(manifest: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Return the YAML block that the Hub and `datasets` read."""
    import yaml

    values: dict[str, Any] = {k: card[k] for k in ("license", "language") if k in card}
    values["tags"] = ["turnwise", manifest["kind"]]
    if manifest["kind"] == "model":
        values |= _model_matter(manifest)
    else:
        files = [{"split": s, "path": f"data/{s}-*.parquet"} for s in manifest["splits"]]
        values["size_categories"] = [size_category(sum(manifest["splits"].values()))]
        values["configs"] = [{"config_name": "default", "data_files": files}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _model_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    # The Hub accepts its own ids here, and no path.
    names = {role: model["name"] for role, model in manifest["models"].items()}
    parents = [entry["name"] for entry in manifest["inputs"]]
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _HUB_ID.fullmatch(base := names.get("base_model") or ""):
        matter["base_model"] = base
    if ids := [name for name in parents if _HUB_ID.fullmatch(name)]:
        matter["datasets"] = ids
    return matter


def size_category(rows: int) -> str:
    """Return the Hub's name for a number of rows."""
    return next((name for limit, name in _SIZES if rows < limit), "1M<n<10M")


def plain(value: Any) -> str:
    """Escape a value so that Markdown shows it as it is, in a table's cell or a sentence."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", html.escape(_printable(text)))


def fenced(value: Any, language: str = "text") -> str:
    """Return a code block that its own text can't close."""
    text = _printable(str(value))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _printable(text: str) -> str:
    return "".join(
        "\ufffd"
        if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _BIDI
        else c
        for c in text
    )


def gather(folder: Path, manifest: Mapping[str, Any]) -> Facts:
    """Read the facts of a repo from its shards, streaming, only the columns that matter."""
    facts = Facts()
    paths = [folder / e["path"] for e in manifest["files"] if "split" in e]
    for path in paths:
        present = read_schema(path).names
        for batch in read_batches([path], [c for c in _counted(present) if c in present], 256):
            facts.lengths.update(_lengths(batch))
            if "rewards" in batch.schema.names:
                _add_rewards(facts, batch.column("rewards").to_pylist())
    facts.samples = _first_dialogues(paths)
    return facts


def _counted(names: Sequence[str]) -> Sequence[str]:
    """Name the columns that lengths and rewards are counted from."""
    for side in ("chosen_", ""):
        if f"{side}segments" in names:
            return [f"{side}segments"]  # they tile the ids, and are a few numbers
    return ["turns", "chosen_token", "token", "rewards"]


def _first_dialogues(paths: Iterable[Path]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = []
    for path in paths:
        present = read_schema(path).names
        for name in (name for name in ("messages", "chosen") if name in present):
            for batch in islice(read_batches([path], [name], _SAMPLES), 1):
                found += batch.column(name).to_pylist()
        if len(found) >= _SAMPLES:
            break
    return found[:_SAMPLES]


def _lengths(batch: pa.RecordBatch) -> list[int]:
    """Return the ids of each row's whole dialogue (of a pair's chosen one)."""
    import pyarrow.compute as pc

    names = batch.schema.names
    for name in ("chosen_segments", "segments"):
        if name in names:
            column = batch.column(name)
            held = pc.struct_field(column.flatten(), "length").to_numpy(zero_copy_only=False)
            return sums(held, bounds_of(list_lengths(column))).tolist()
    for name in ("chosen_token", "token"):
        if name in names:
            return [n or 0 for n in pc.list_value_length(batch.column(name)).to_pylist()]
    if "turns" not in names:
        return []
    turns = batch.column("turns").drop_null()  # text that no engine of ours produced has no ids
    flat = turns.flatten()
    keeps = pc.struct_field(flat, "keep").to_pylist()
    prompts, responses = (
        pc.list_value_length(pc.struct_field(flat, name)).to_pylist()
        for name in ("prompt_ids", "response_ids")
    )
    counts = pc.list_value_length(turns).to_pylist()
    return _context_lengths(list(zip(keeps, prompts, responses, strict=True)), counts)


def _context_lengths(turns: Sequence[tuple[int, int, int]], counts: Iterable[int]) -> list[int]:
    # A turn's context is cut to `keep` ids before its prompt is added (records.Turn).
    lengths, start = [], 0
    for count in counts:
        length = 0
        for keep, prompt, response in turns[start : start + count]:
            length = min(keep, length) + prompt + response
        lengths.append(length)
        start += count
    return lengths


def _add_rewards(facts: Facts, rows: Iterable[list[float | None] | None]) -> None:
    for row in rows:
        for turn, value in enumerate(row or []):
            if value is not None:
                facts.rewards.setdefault(turn, Tally()).add(value)


def histogram(lengths: Mapping[int, int]) -> str:
    """Draw a histogram (length -> rows) in text, at most _BARS bars; empty without lengths."""
    if not lengths:
        return ""
    low, high = min(lengths), max(lengths)
    width = (high - low) // _BARS + 1
    counts = [0] * ((high - low) // width + 1)
    for length, rows in lengths.items():
        counts[(length - low) // width] += rows
    lines = []
    for index, count in enumerate(counts):
        start = low + index * width
        bar = "█" * -(-count * _BAR_WIDTH // max(counts))
        lines.append(f"{start:>7} - {start + width - 1:<7} {count:>8} {bar}".rstrip())
    return "\n".join(lines)


def show_dialogue(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a dialogue as text, long ones cut with a word on how much."""
    lines = []
    for message in messages[:_SAMPLE_MESSAGES]:
        content = spoken(message)
        calls = ", ".join(f"{c['name']}({c['arguments']})" for c in message.get("tool_calls") or [])
        text = f"{content} {calls}".strip()
        cut = len(text) - _SAMPLE_CHARS
        shown = f"{text[:_SAMPLE_CHARS]} [... {cut} more characters]" if cut > 0 else text
        lines.append(f"{message['role']}: {shown}")
    if (more := len(messages) - _SAMPLE_MESSAGES) > 0:
        lines.append(f"[... {more} more messages]")
    return "\n\n".join(lines)
