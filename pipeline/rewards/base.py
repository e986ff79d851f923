"""The reward seam: rollouts in; per policy turn a score, or the reason why there is none."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.errors import EngineError
from pipeline.records import FINISH_REASONS, Message, RewardPart, Rollout
from pipeline.thoughts import spoken

NOT_A_DIALOGUE = "not_a_dialogue"
EMPTY_RESPONSE = "empty_response"
NO_POLICY_TURN = "no_policy_turn"
TOO_LONG = "too_long"
NO_ASSISTANT_HEADER = "no_assistant_header"
"""Reasons are conditions of the row. A failure of the machine is an exception, never a reason."""

_SPEAKERS = {"system", "developer", "user", "assistant", "tool"}


@dataclass(slots=True)
class Scored:
    """Rewards of one rollout, one entry for each policy turn.

    A reward without an error is a score; an error without a reward says why there is none;
    neither means that the turn was not asked for. The values of `parts` are laid out like
    `rewards`: None where there is no score.
    """

    rewards: list[float | None]
    errors: list[str | None]
    parts: list[RewardPart] = field(default_factory=list)


class RewardModel(Protocol):
    """Whatever scores policy turns.

    `name` + `fingerprint` say what gave a score; `reads_reply`: turn t's score needs the reply
    that follows it, and then the rollout plays it. `parallel`: how many calls of `score` may run at
    once, each in a thread of its own.
    """

    name: str
    fingerprint: str
    reads_reply: bool
    parallel: int

    def score(self, rollouts: Sequence[Rollout], turns: Sequence[Sequence[int]]) -> list[Scored]:
        """Score the asked policy turns (0-based) of each rollout, in the rollouts' order.

        Raises EngineError when the model fails (out of memory, a score that is no number).
        """
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How a reward model runs; rules and functions need none of it.

    `max_length`: ids of the longest prefix that is scored. `max_tokens_per_batch`: ids of a forward
    pass, padding included; 0 goes by the device. `packing`: auto or none. `bos`: "template" scores
    what the chat template renders, "none" drops its BOS.
    `date`: what templates see as today (YYYY-MM-DD).
    """

    max_length: int = 4096
    dtype: str = "auto"
    device: str = "auto"
    max_tokens_per_batch: int = 0
    packing: str = "auto"
    keep_objectives: bool = False
    bos: str = "template"
    date: str = "2024-07-26"


def policy_messages(rollout: Rollout) -> list[int]:
    """Return the index in `messages` of each policy turn.

    Assistant messages of the prompt itself (a dialogue that was already going on) come before the
    played turns, so the last `len(turns)` are the policy's; of text that nobody played all are.
    """
    said = [i for i, message in enumerate(rollout.messages) if message.get("role") == "assistant"]
    played = rollout.info.get(FINISH_REASONS) if rollout.turns is None else rollout.turns
    return said if played is None else said[len(said) - len(played) :]


def prefix(rollout: Rollout, turn: int) -> list[Message]:
    """Return the messages up to and including a policy turn."""
    return rollout.messages[: policy_messages(rollout)[turn] + 1]


def blank(rollout: Rollout, asked: Iterable[int]) -> tuple[Scored, list[int]]:
    """Return an empty result and the asked turns that can be scored.

    Fills in the reasons that hold for every reward: no dialogue, no such turn, an empty response.
    An asked turn that isn't there still gets its place, so that `rewards[score_turn]` exists.
    """
    asked = sorted(set(asked))
    policy = policy_messages(rollout)
    size = max(len(policy), asked[-1] + 1 if asked else 0)
    scored = Scored([None] * size, [None] * size)
    for turn in asked:
        scored.errors[turn] = _row_error(rollout, policy, turn)
    return scored, [turn for turn in asked if scored.errors[turn] is None]


def _row_error(rollout: Rollout, policy: list[int], turn: int) -> str | None:
    if not rollout.messages:
        return NOT_A_DIALOGUE
    if not 0 <= turn < len(policy):
        return NO_POLICY_TURN
    messages = rollout.messages[: policy[turn] + 1]
    if not all(_is_message(message) for message in messages):
        return NOT_A_DIALOGUE
    said = messages[-1]
    if not spoken(said).strip() and not said.get("tool_calls"):
        return EMPTY_RESPONSE
    return None


def _is_message(message: Message) -> bool:
    content = message.get("content")
    return message.get("role") in _SPEAKERS and (content is None or isinstance(content, str))


def require_finite(value: float, name: str, rollout: Rollout, turn: int) -> float:
    """Return the score; raise EngineError naming the row when it is NaN or infinite."""
    if math.isfinite(value):
        return value
    raise EngineError(
        f"reward model {name!r} gave {value} for prompt_id {rollout.prompt_id!r}, sample"
        f" {rollout.sample}, policy turn {turn}: a broken model or dtype, not a bad dialogue."
        " Nothing was written for this batch; try --dtype float32, then run the same command again"
    )
