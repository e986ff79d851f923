"""The nouns that stages exchange, their Arrow schemas, and the checks a row must pass.

Axes: ids are int32 and unpadded; `*_mask` is uint8, 1 for each id that trains; `*_logprob` and
`advantage` hold one float32 for each masked id, in order.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

NO_SCORE = -99999.0
"""The reward on disk where a score was asked for and there is none (the seed's convention)."""

FAILURE = "failure"
"""In `info`: why a server failed a rollout. Such a one isn't finished; it goes on at its turn."""
FINISH_REASONS = "finish_reasons"
"""In `info` of a rollout that was played as text: how each of its turns ended."""
USER_RETRIES = "user_retries"
"""In `info`: how often a simulated user was asked again, by policy turn."""
PLAY_INFO = frozenset({FAILURE, FINISH_REASONS, USER_RETRIES})
"""Keys of `info` that tell of one run; a prompt made from a rollout doesn't carry them along."""

IntArray = npt.NDArray[np.int32]
MaskArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


class ToolCall(TypedDict):
    """One call of a tool; `arguments` is a JSON string on disk."""

    id: str
    name: str
    arguments: str


class Message(TypedDict, total=False):
    """One message of a dialogue. Absent and null mean the same; chat.py drops nulls."""

    role: str
    content: str | None
    reasoning_content: str | None
    name: str | None
    tool_calls: list[ToolCall] | None
    tool_call_id: str | None


@dataclass(slots=True)
class Prompt:
    """The opening of a dialogue; `prompt_id` is a hash of the content, or the dataset's own."""

    prompt_id: str
    messages: list[Message]
    info: dict[str, Any] = field(default_factory=dict)
    tools: str | None = None


@dataclass(slots=True)
class Turn:
    """What the policy saw and said at one of its turns.

    `context_t = (context_{t-1} + response_{t-1})[:keep] + prompt_ids`. `response_ids` end with the
    stop token only if the model sampled it. `logprobs` (one for each response id) are those of the
    distribution sampled from, or None where the engine renormalised it.
    """

    keep: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


@dataclass(slots=True)
class RewardPart:
    """A named component of a reward, one value for each policy turn; see the columns of rewards."""

    name: str
    kind: str
    values: list[float | None]


@dataclass(slots=True)
class Rollout:
    """One dialogue of a policy with its environment; `prompt_id` + `sample` is the key.

    `branch_turn` (h) and `score_turn` (L) are 0-based policy turns. `turns` is None for text that
    no engine of ours produced. The reward fields are None until `rank` has filled them.
    """

    prompt_id: str
    sample: int
    messages: list[Message]
    turns: list[Turn] | None
    branch_turn: int | None
    score_turn: int
    status: str
    end_reason: str
    tools: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rewards: list[float | None] | None = None
    reward_errors: list[str | None] | None = None
    reward_parts: list[RewardPart] | None = None
    reward_model: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample


@dataclass(slots=True)
class Segment:
    """`length` ids from `start`, seen after the first `keep` ids of all that came before them."""

    start: int
    length: int
    keep: int


@dataclass(slots=True)
class Span:
    """Where a policy turn's sampled ids are: ids[start:end]."""

    turn: int
    start: int
    end: int


@dataclass(slots=True)
class TrainingSequence:
    """Ids cut into segments, with the mask of what trains and the spans of the policy's turns."""

    ids: IntArray
    mask: MaskArray
    segments: list[Segment]
    spans: list[Span]


@dataclass(slots=True)
class Member:
    """One rollout inside a pair. Log-probs: one float32 for each masked id, or None."""

    sample: int
    messages: list[Message]
    sequence: TrainingSequence
    reward: float
    sample_logprob: FloatArray | None = None
    old_logprob: FloatArray | None = None
    ref_logprob: FloatArray | None = None


@dataclass(slots=True)
class PairExample:
    """Two rollouts of one prompt; the key is (prompt_id, chosen.sample, reject.sample)."""

    prompt_id: str
    branch_turn: int | None
    score_turn: int
    chosen: Member
    reject: Member
    prefix_length: int


@dataclass(slots=True)
class GroupExample:
    """One rollout of a group. `advantage`: one float32 for each masked id; None for SFT."""

    prompt_id: str
    sample: int
    sequence: TrainingSequence
    reward: float | None
    advantage: FloatArray | None
    sample_logprob: FloatArray | None = None
    old_logprob: FloatArray | None = None
    ref_logprob: FloatArray | None = None


TOOL_CALL = pa.struct([("id", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_calls", pa.list_(TOOL_CALL)),
        ("tool_call_id", pa.string()),
    ]
)
TURN = pa.struct(
    [
        ("keep", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)
REWARD_PART = pa.struct(
    [("name", pa.string()), ("kind", pa.string()), ("values", pa.list_(pa.float64()))]
)
SEGMENTS = pa.list_(
    pa.struct([("start", pa.int32()), ("length", pa.int32()), ("keep", pa.int32())])
)
SPANS = pa.list_(pa.struct([("turn", pa.int32()), ("start", pa.int32()), ("end", pa.int32())]))
FLOATS = pa.list_(pa.float32())

ROLLOUTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("messages", pa.list_(MESSAGE)),
        ("tools", pa.string()),
        ("turns", pa.list_(TURN)),
        ("branch_turn", pa.int32()),
        ("score_turn", pa.int32()),
        ("status", pa.string()),
        ("end_reason", pa.string()),
        ("info", pa.string()),
    ]
)
REWARD_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("rewards", pa.list_(pa.float64())),
    ("reward_errors", pa.list_(pa.string())),
    ("reward_parts", pa.list_(REWARD_PART)),
    ("reward_model", pa.string()),
]
RANKED = pa.schema([*ROLLOUTS, *(pa.field(name, kind) for name, kind in REWARD_COLUMNS)])

_MEMBER_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("token", pa.list_(pa.int32())),
    ("mask", pa.list_(pa.uint8())),
    ("segments", SEGMENTS),
    ("spans", SPANS),
    ("reward", pa.float64()),
    ("sample_logprob", FLOATS),
]
PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_sample", pa.int32()),
        ("reject_sample", pa.int32()),
        ("branch_turn", pa.int32()),
        ("score_turn", pa.int32()),
        ("prefix_length", pa.int32()),
        *[
            (f"{side}{name}", kind)
            for side in ("chosen", "reject")
            for name, kind in [
                ("", pa.list_(MESSAGE)),
                *((f"_{name}", kind) for name, kind in _MEMBER_COLUMNS),
            ]
        ],
    ]
)
GROUPS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        *_MEMBER_COLUMNS,
        ("advantage", FLOATS),
    ]
)
WRITTEN_BY = {
    **dict.fromkeys(ROLLOUTS.names, "generate"),
    **{name: "rank" for name, _ in REWARD_COLUMNS},
    **dict.fromkeys([*PAIRS.names, *GROUPS.names], "tokenize_masks"),
    "prompt_id": "generate",
    "sample": "generate",
    "branch_turn": "generate",
    "score_turn": "generate",
}
"""The stage that writes each column, for errors about a missing one."""
