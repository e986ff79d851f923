"""Score the rollouts of a repo in chunks that depend on the input alone.

Rows are taken in windows of the input's order; inside a window they are sorted so that a chunk
holds dialogues of about one length, and the rollouts of a prompt stay together. A chunk is scored
whole or not at all: whoever scores it, and however often the stage was killed before, its batches
and so its scores are the same.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.journal import read_journal
from pipeline.records import NO_SCORE, ROLLOUTS, Message, RewardPart, Rollout
from pipeline.repos import Repo, read_rollouts
from pipeline.rewards.base import RewardModel, Scored, policy_messages
from pipeline.rows import clean_message, message_row

WINDOW_ROWS = 512
CHUNK_ROWS = 32

SEED_COLUMNS = ("trajectory", "trajectory_sampled_h_from_sampled_len")
"""Where REFUEL's generate puts a prompt's two rollouts; the second forks at `BRANCH_COLUMN`."""
_BRANCH_COLUMN = "sampled_h_from_sampled_len"
_SCORE_COLUMN = "sampled_len_from_"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one window. `number` counts the chunks of a split; `rows` are indices in it."""

    number: int
    rows: list[int]
    rollouts: list[Rollout]


def count_chunks(rows: int) -> int:
    """Return how many chunks a split of so many rows makes."""
    windows, rest = divmod(rows, WINDOW_ROWS)
    return windows * -(-WINDOW_ROWS // CHUNK_ROWS) + -(-rest // CHUNK_ROWS)


def windows(rollouts: Iterable[Rollout]) -> Iterator[list[Chunk]]:
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
            chunks.append(Chunk(number, [row for row, _ in part], [item for _, item in part]))
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
    """The records of several journals, by chunk, read no further ahead than needed.

    Every process journals its chunks in ascending order, so that little waits in memory.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._streams = [read_journal(path) for path in paths]
        self._waiting: dict[str, list[dict[str, Any]]] = {}

    def take(self, key: str) -> list[dict[str, Any]]:
        """Return the scores of one chunk. Raises DataError where no journal has it."""
        while key not in self._waiting:
            heads = [record for stream in self._streams if (record := next(stream, None))]
            if not heads:
                raise DataError(f"no journal has chunk {key}: run the same command again")
            self._waiting |= {record["chunk"]: record["scores"] for record in heads}
        return self._waiting.pop(key)


def ranked_windows(
    rollouts: Iterable[Rollout], split: str, records: Records, reward_model: str
) -> Iterator[list[Rollout]]:
    """Give rollouts their rewards; yield them window by window, in the input's order."""
    for window in windows(rollouts):
        rows: dict[int, Rollout] = {}
        for chunk in window:
            scores = records.take(f"{split}/{chunk.number}")
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


def rollouts_of(repo: Repo, split: str, columns: Sequence[str] = SEED_COLUMNS) -> Iterator[Rollout]:
    """Stream a repo's rollouts: of generate, of any dataset with `messages`, or of REFUEL's script.

    Where no engine of ours played them, the policy turns are the assistant messages, the last of
    which is the score turn unless a column says otherwise; other plain columns go into `info`.
    """
    present = set(repo.columns(split))
    if present.issuperset(ROLLOUTS.names):
        return read_rollouts(repo, split)
    if "messages" in present:
        return _from_messages(repo, split)
    if present.issuperset(columns):
        return _from_columns(repo, split, columns)
    raise DataError(
        f"{repo.name} has neither the columns of a rollouts repo (stages/generate.py writes it) nor"
        f" `messages` nor {', '.join(columns)}; it has: {', '.join(sorted(present))}. Name the"
        " columns that hold dialogues with --columns"
    )


def rollouts_per_row(repo: Repo, split: str, columns: Sequence[str] = SEED_COLUMNS) -> int:
    """Return how many rollouts a row of the repo holds."""
    return 1 if "messages" in repo.columns(split) else len(columns)


def _from_messages(repo: Repo, split: str) -> Iterator[Rollout]:
    for number, row in enumerate(_rows(repo, split)):
        yield _foreign(row, number, row["messages"], sample=row.get("sample") or 0)


def _from_columns(repo: Repo, split: str, columns: Sequence[str]) -> Iterator[Rollout]:
    for number, row in enumerate(_rows(repo, split)):
        score_turn = next((row[name] for name in row if name.startswith(_SCORE_COLUMN)), None)
        fork = {"branch_turn": row.get(_BRANCH_COLUMN), "score_turn": score_turn}
        for sample, column in enumerate(columns):
            yield _foreign(row | fork, number, row[column], sample)


def _rows(repo: Repo, split: str) -> Iterator[dict[str, Any]]:
    for batch in repo.batches(split, batch_rows=64):
        yield from batch.to_pylist()


def _foreign(row: Mapping[str, Any], number: int, said: Any, sample: int) -> Rollout:
    messages = _messages(said)
    last = sum(message.get("role") == "assistant" for message in messages) - 1
    score_turn = row.get("score_turn")
    return Rollout(
        prompt_id=str(row.get("prompt_id") or f"row-{number:08d}"),
        sample=sample,
        messages=messages,
        turns=None,
        branch_turn=row.get("branch_turn"),
        score_turn=max(last, 0) if score_turn is None else score_turn,
        status="complete",
        end_reason="",
        tools=row.get("tools") if isinstance(row.get("tools"), str) else None,
        info=_info(row),
    )


def _messages(said: Any) -> list[Message]:
    """Read messages under the common names of their fields; what is none of them gives no dialogue.

    Such a row keeps its place, and gets the reason `not_a_dialogue`.
    """
    if not isinstance(said, list) or not all(isinstance(item, dict) for item in said):
        return []
    messages = []
    for item in said:
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or not isinstance(content, str | None):
            return []
        renamed = {"role": _ROLES.get(role, role), "content": content}
        messages.append(clean_message(message_row({**item, **renamed})))  # type: ignore[typeddict-item]
    return messages


def _info(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row.get("info")
    if isinstance(given, str) and given.startswith("{"):
        return dict(json.loads(given))
    known = {*ROLLOUTS.names, *SEED_COLUMNS}
    return {
        name: value
        for name, value in row.items()
        if name not in known and isinstance(value, str | int | float | bool)
    }
