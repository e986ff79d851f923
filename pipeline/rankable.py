"""Read what rank scores: generate's rollouts, any dataset with `messages`, or REFUEL's columns."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import DataError
from pipeline.records import ROLLOUTS, Message, Rollout
from pipeline.repos import Repo, read_rollouts
from pipeline.rows import clean_message, message_row

SEED_COLUMNS = ("trajectory", "trajectory_sampled_h_from_sampled_len")
"""Where REFUEL's generate puts a prompt's two rollouts; the second forks at `BRANCH_COLUMN`."""
_BRANCH_COLUMN = "sampled_h_from_sampled_len"
_SCORE_COLUMN = "sampled_len_from_"
_ROLES = {"human": "user", "gpt": "assistant"}


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
