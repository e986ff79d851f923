"""Rows of text that others wrote -> rollouts without ids: preferences, completions, dialogues.

The shapes are those of TRL's conversational datasets (https://huggingface.co/docs/trl/dataset_formats),
of HH's transcripts and of UltraInteract.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from pipeline.errors import DataError, RowError
from pipeline.records import Message, Rollout
from pipeline.text_messages import (
    NOT_A_DIALOGUE,
    asked,
    continued,
    messages_of,
    opening_of,
    tools_of,
)

Row: TypeAlias = Mapping[str, Any]
Reader: TypeAlias = Callable[[Row], list[Rollout]]

TEXT_COLUMNS = ("chosen", "rejected")
_REJECTED = ("rejected", "reject")
_PROMPTS = ("prompt", "trajectory")
_DIALOGUES = ("messages", "conversations")
_SCORES = ("score_{}", "{}_score", "{}_rating", "{}-rating", "{}_reward")
NOT_A_PAIR = "not_a_pair"
DUPLICATE = "duplicate"


def reader_of(columns: Collection[str], form: str, name: str) -> tuple[Reader, list[str]]:
    """Return what reads rows as `pairs` or `groups`, and the columns that it reads.

    Raises DataError, with the columns that are known, for a dataset that has none of them.
    """
    present = set(columns)
    if form == "groups" and present & set(_DIALOGUES):
        return rollouts_of_dialogue, _known(present, _DIALOGUES)
    if "chosen" in present and present & set(_REJECTED):
        scores = [scheme.format(side) for scheme in _SCORES for side in ("chosen", *_REJECTED)]
        return rollouts_of_text, _known(present, (*_PROMPTS, "chosen", *_REJECTED, *scores))
    # With a label, completions are good ones and bad ones.
    if form == "groups" and {"prompt", "completion"} <= present and "label" not in present:
        return rollouts_of_completion, _known(present, ("prompt", "completion"))
    wanted = {
        "pairs": "chosen and rejected, with or without prompt",
        "groups": "messages, prompt and completion, or chosen and rejected",
    }
    raise DataError(
        f"{name} has no columns that --format {form} reads: neither those of a rollouts repo "
        f"(stages/generate.py writes it) nor of dialogues as text ({wanted[form]}); it has: "
        + ", ".join(sorted(present))
    )


def _known(present: set[str], names: Iterable[str]) -> list[str]:
    return [name for name in (*names, "tools") if name in present]


def rollouts_of_text(row: Row) -> list[Rollout]:
    """Turn a preference into two rollouts without ids that part at an answer.

    `score_chosen` and `score_rejected` and the like are their rewards where a dataset has them; a
    mere preference is 1 and 0. Raises RowError for what is no pair of dialogues.
    """
    names = ["chosen", next(name for name in _REJECTED if name in row)]
    opening = _opening(row)
    texts = [
        messages_of(row[name]) if opening is None else continued(opening, row[name])
        for name in names
    ]
    fork = fork_of(*texts)
    if fork is None:
        raise RowError(NOT_A_PAIR, "the texts don't part at an answer")
    tools = tools_of(row.get("tools"))
    rewards = _rewards(row, names)
    return [_rollout(texts[k], k, tools, fork, rewards[k]) for k in range(2)]


def rollouts_of_completion(row: Row) -> list[Rollout]:
    """Turn a prompt and its completion into a rollout whose policy begins with the completion."""
    opening = _opening(row)
    if opening is None:
        raise RowError(NOT_A_DIALOGUE, "no prompt")
    messages = continued(opening, row["completion"])
    return [_rollout(messages, 0, tools_of(row.get("tools")), _answers(asked(opening)), None)]


def rollouts_of_dialogue(row: Row) -> list[Rollout]:
    """Turn a dialogue into a rollout; every answer is the policy's."""
    value = next((row[name] for name in _DIALOGUES if row.get(name)), None)
    return [_rollout(messages_of(value), 0, tools_of(row.get("tools")), None, None)]


def _opening(row: Row) -> list[Message] | str | None:
    value = next((row[name] for name in _PROMPTS if row.get(name)), None)
    return None if value is None else opening_of(value)


def _rewards(row: Row, names: list[str]) -> list[float | None]:
    for scheme in _SCORES:
        columns = [scheme.format(name) for name in names]
        if all(column in row for column in columns):
            return [_number(row[column]) for column in columns]
    return [1.0, 0.0]


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _rollout(
    messages: list[Message],
    sample: int,
    tools: str | None,
    fork: int | None,
    reward: float | None,
) -> Rollout:
    # The text after the last answer (HH has a few) is nothing that the policy said.
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise RowError(NOT_A_DIALOGUE, "no answer")
    return Rollout(
        prompt_id=prompt_id_of(messages),
        sample=sample,
        messages=messages[: spoken[-1] + 1],
        turns=None,
        branch_turn=fork,
        score_turn=len(spoken) - 1,
        status="complete",
        end_reason="text",
        tools=tools,
        rewards=[*[None] * (len(spoken) - 1), reward],
    )


def fork_of(left: list[Message], right: list[Message]) -> int | None:
    """Return the policy turn at which two dialogues part; None where it is no turn of both's."""
    shorter = min(len(left), len(right))
    first = next((i for i in range(shorter) if left[i] != right[i]), None)
    if first is None or any(text[first].get("role") != "assistant" for text in (left, right)):
        return None
    return _answers(left[:first])


def _answers(messages: list[Message]) -> int:
    return sum(message.get("role") == "assistant" for message in messages)


def prompt_id_of(messages: list[Message]) -> str:
    """Hash what comes before the first answer, so that pairs of one prompt share a split."""
    end = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))
    text = json.dumps(messages[:end], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Keys:
    """Sample numbers for rows that came without: the k-th pair of a prompt has 2k and 2k+1."""

    def __init__(self, each: int = 2) -> None:
        self._each = each
        self._seen: Counter[str] = Counter()

    def take(self, prompt_id: str) -> list[int]:
        """Return the numbers of a prompt's next row."""
        first = self._each * self._seen[prompt_id]
        self._seen[prompt_id] += 1
        return list(range(first, first + self._each))


def text_rollouts(
    rows: Iterable[Row | RowError], read: Reader
) -> Iterator[tuple[list[Rollout], list[dict[str, Any]]]]:
    """Yield, for each row, its rollouts or why it is dropped; a row that was there before is."""
    keys: dict[int, Keys] = {}
    seen = set[bytes]()
    for place, row in enumerate(rows):
        try:
            rollouts = _new(row, read, seen)
        except RowError as error:
            yield [], [{"row": place, "reason": error.reason, "detail": error.detail}]
            continue
        count = len(rollouts)
        samples = keys.setdefault(count, Keys(count)).take(rollouts[0].prompt_id)
        for rollout, sample in zip(rollouts, samples, strict=True):
            rollout.sample = sample
        yield rollouts, []


def _new(row: Row | RowError, read: Reader, seen: set[bytes]) -> list[Rollout]:
    """Read a row. Raises RowError where it says what another row has said."""
    if isinstance(row, RowError):
        raise row
    rollouts = read(row)
    said = [(rollout.messages, rollout.tools, rollout.rewards) for rollout in rollouts]
    text = json.dumps(said, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).digest()
    if digest in seen:
        raise RowError(DUPLICATE, "an earlier row says the same")
    seen.add(digest)
    return rollouts
