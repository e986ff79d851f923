"""Score the rollouts of a repo in chunks that depend on the input alone.

Rows are taken in windows of the input's order; inside a window they are sorted so that a chunk
holds dialogues of about one length, and the rollouts of a prompt stay together. A chunk is scored
whole or not at all: whoever scores it, and however often the stage was killed before, its batches
and so its scores are the same.
"""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.journal import read_places
from pipeline.records import NO_SCORE, RewardPart, Rollout
from pipeline.rewards.base import RewardModel, Scored, policy_messages

WINDOW_ROWS = 512
CHUNK_ROWS = 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one window. `number` counts the chunks of a split; `rows` are indices in it."""

    split: str
    number: int
    rows: list[int]
    rollouts: list[Rollout]

    @property
    def key(self) -> str:
        """Return what the journal calls this chunk."""
        return f"{self.split}/{self.number}"


def count_chunks(rows: int) -> int:
    """Return how many chunks a split of so many rows makes."""
    windows, rest = divmod(rows, WINDOW_ROWS)
    return windows * -(-WINDOW_ROWS // CHUNK_ROWS) + -(-rest // CHUNK_ROWS)


def windows(rollouts: Iterable[Rollout], split: str) -> Iterator[list[Chunk]]:
    """Cut a stream of rollouts into windows, each a list of chunks; memory stays bounded."""
    stream = enumerate(rollouts)
    number = 0
    while window := list(islice(stream, WINDOW_ROWS)):
        longest: dict[str, int] = {}
        for _, rollout in window:
            longest[rollout.prompt_id] = max(longest.get(rollout.prompt_id, 0), _length(rollout))
        window.sort(key=lambda item: (longest[item[1].prompt_id], item[1].prompt_id, item[0]))
        chunks = []
        for start in range(0, len(window), CHUNK_ROWS):
            part = window[start : start + CHUNK_ROWS]
            rows = [row for row, _ in part]
            chunks.append(Chunk(split, number, rows, [item for _, item in part]))
            number += 1
        yield chunks


def _length(rollout: Rollout) -> int:
    return sum(len(message.get("content") or "") for message in rollout.messages)


def asked_turns(rollout: Rollout, which: str, num_turns: int = 0) -> list[int]:
    """Return the policy turns to score: "all" of them (the first `num_turns`), or the "needed" one.

    The needed one is `score_turn`: the only turn whose reward trains a pair.
    """
    if rollout.score_turn is None or rollout.score_turn < 0:
        raise DataError(
            f"prompt_id {rollout.prompt_id!r}, sample {rollout.sample} has score_turn"
            f" {rollout.score_turn}; it's the 0-based policy turn whose reward trains"
        )
    if which == "needed":
        return [rollout.score_turn]
    turns = len(policy_messages(rollout)) or 1
    return list(range(min(turns, num_turns or turns)))


def score_chunks(
    model: RewardModel, chunks: Iterable[Chunk], which: str, num_turns: int = 0
) -> Iterator[tuple[Chunk, list[dict[str, Any]]]]:
    """Score chunks, `model.parallel` of them at once; yield each with its records, in their order.

    So a model's next dialogues are encoded while it reads, and a server is never without work.
    """
    if model.parallel == 1:
        for chunk in chunks:
            yield chunk, score_chunk(model, chunk, which, num_turns)
        return
    pool = ThreadPoolExecutor(model.parallel, thread_name_prefix="score")
    under_way: deque[tuple[Chunk, Future[list[dict[str, Any]]]]] = deque()
    try:
        for chunk in chunks:
            under_way.append((chunk, pool.submit(score_chunk, model, chunk, which, num_turns)))
            if len(under_way) > model.parallel:
                first, scores = under_way.popleft()
                yield first, scores.result()
        while under_way:
            first, scores = under_way.popleft()
            yield first, scores.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def score_chunk(
    model: RewardModel, chunk: Chunk, which: str, num_turns: int = 0
) -> list[dict[str, Any]]:
    """Score a chunk; return a JSON-able record for each row, in the chunk's order."""
    asked = [asked_turns(rollout, which, num_turns) for rollout in chunk.rollouts]
    return [_record(scored) for scored in model.score(chunk.rollouts, asked)]


def _record(scored: Scored) -> dict[str, Any]:
    return {
        "rewards": _on_disk(scored.rewards, scored.errors),
        "errors": scored.errors,
        "parts": [
            [part.name, part.kind, _on_disk(part.values, scored.errors)] for part in scored.parts
        ],
    }


def _on_disk(values: Sequence[float | None], errors: Sequence[str | None]) -> list[float | None]:
    """Write NO_SCORE where a score was asked for and there is none; None stays "not asked for"."""
    return [NO_SCORE if error else value for value, error in zip(values, errors, strict=True)]


class Records:
    """The records of several journals by chunk: where each is on disk, not what it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Path, int]] = {}
        self._last: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read what was appended since the last time, by this process and by others."""
        for path in sorted(self._folder.glob("journal-*.jsonl")):
            for start, record in read_places(path, self._last.get(path, 0)):
                self._places.setdefault(record["chunk"], (path, start))
                self._last[path] = start

    def missing(self, chunks: Mapping[str, int], world: int) -> Counter[int]:
        """Return rank -> how many of its chunks no journal has. `chunks`: split -> their number."""
        self.refresh()
        return Counter(
            number % world
            for split, count in chunks.items()
            for number in range(count)
            if f"{split}/{number}" not in self._places
        )

    def take(self, key: str) -> list[dict[str, Any]]:
        """Return the scores of one chunk. Raises DataError where no journal has it."""
        if key not in self._places:
            raise DataError(f"no journal has chunk {key}: run the same command again")
        path, start = self._places[key]
        with path.open("rb") as file:
            file.seek(start)
            scores: list[dict[str, Any]] = json.loads(file.readline())["scores"]
        return scores


def ranked_windows(
    rollouts: Iterable[Rollout], split: str, records: Records, reward_model: str
) -> Iterator[list[Rollout]]:
    """Give rollouts their rewards; yield them window by window, in the input's order."""
    for window in windows(rollouts, split):
        rows: dict[int, Rollout] = {}
        for chunk in window:
            scores = records.take(chunk.key)
            for row, rollout, record in zip(chunk.rows, chunk.rollouts, scores, strict=True):
                rows[row] = ranked(rollout, record, reward_model)
        yield [rows[row] for row in sorted(rows)]


def ranked(rollout: Rollout, record: Mapping[str, Any], reward_model: str) -> Rollout:
    """Return the rollout with its record's rewards."""
    rollout.rewards = record["rewards"]
    rollout.reward_errors = record["errors"]
    rollout.reward_parts = [RewardPart(*part) for part in record["parts"]]
    rollout.reward_model = reward_model
    return rollout
