"""Rollouts with ids for tests: small numbers, so that masks can be read off."""

from collections.abc import Sequence
from typing import Any

from pipeline.records import Message, Rollout, Turn


def messages_of(said: Sequence[str]) -> list[Message]:
    """Alternate user and assistant; `said` is what the assistant says."""
    dialogue: list[Message] = []
    for i, text in enumerate(said):
        dialogue += [
            Message(role="user", content=f"question {i}"),
            Message(role="assistant", content=text),
        ]
    return dialogue


def played(
    responses: Sequence[Sequence[int]], keeps: Sequence[int] | None = None, **changes: Any
) -> Rollout:
    """Return a rollout whose turn t was prompted with ids [10 + t, 20 + t] and said responses[t].

    `keeps[t]` ids of the context before turn t are kept; all of them unless told. Log-probs are
    minus the place of each sampled id in the dialogue.
    """
    turns, length, place = list[Turn](), 0, 0
    for t, ids in enumerate(responses):
        keep = length if keeps is None else keeps[t]
        logprobs = [-float(place + i) for i in range(len(ids))]
        turns.append(Turn(keep, [10 + t, 20 + t], list(ids), logprobs, "stop"))
        length, place = keep + 2 + len(ids), place + len(ids)
    values: dict[str, Any] = {
        "prompt_id": "p",
        "sample": 0,
        "messages": messages_of([str(list(ids)) for ids in responses]),
        "turns": turns,
        "branch_turn": None,
        "score_turn": len(turns) - 1,
        "status": "complete",
        "end_reason": "score_turn",
        "rewards": [float(t) for t in range(len(turns))],
        "reward_errors": [None] * len(turns),
        "reward_parts": [],
        "reward_model": "rule",
    }
    return Rollout(**values | changes)
