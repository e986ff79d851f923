"""The engine seam: ids in, ids and their log-probs out, with the reason why it stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import EngineError, RequestFailed
from pipeline.records import Message

if TYPE_CHECKING:
    from pipeline.engines.rounds import Rounds

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineOptions",
    "Request",
    "RequestFailed",
    "Sampling",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a party samples. `temperature` 0 is greedy; `top_k` 0 is off.

    `stop`: texts that end a turn as soon as one is said; it stays among what was said.
    """

    temperature: float = 0.8
    max_tokens: int = 1024
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    @property
    def renormalises(self) -> bool:
        """Whether the distribution sampled from isn't the tempered softmax of the logits."""
        filtered = self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0
        return filtered or self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion: `ids` is the whole context, `key` orders requests of one round.

    `messages` is the same context as text, for engines that take nothing else (chat APIs, scripts).
    """

    ids: Sequence[int]
    seed: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    key: tuple[str, int, int]
    messages: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in ids: context, sampled, and of the context what a server had cached.

    `cached_tokens` is None where nobody says.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids, ending with a stop token only if it was sampled.

    `logprobs`: one float for each id, of the tempered distribution sampled from (natural log); None
    where the engine renormalised it (top_p, top_k, min_p, greedy). `finish_reason`: "stop" or
    "length". An engine that `speaks` text gives no ids: `text` (and `reasoning`, the thoughts of a
    model whose server tells them apart) is what it said. `usage` None: the ids are all there is.
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    text: str | None = None
    reasoning: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs to start; each reads the fields that concern it.

    `rounds` is shared by the engines of a stage. `urls`: attach to servers instead of starting one.
    `log_dir`: where a started server's log goes. `gpus`: what it sees, as CUDA_VISIBLE_DEVICES.
    `max_model_len` 0: the model's own context. Servers: a request is sent `attempts` times at the
    most, each bounded by `timeout_s`; a started one that dies is started again `restarts` times;
    `api_key_env` names the environment variable with the key of an API; `tell` shows a line. Who
    opens an engine in a thread sets `cancelled` when nobody waits for it any more.
    """

    rounds: Rounds
    dtype: str = "auto"
    device: str = "auto"
    max_batch_tokens: int = 65536
    max_batch_rows: int = 256
    urls: tuple[str, ...] = ()
    gpus: str = ""
    tensor_parallel: int = 1
    max_model_len: int = 0
    log_dir: Path = Path()
    script: str = ""
    trust_remote_code: bool = False
    extra_args: tuple[str, ...] = ()
    timeout_s: float = 3600.0
    attempts: int = 6
    restarts: int = 3
    api_key_env: str = ""
    tell: Callable[[str], None] = print
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine(Protocol):
    """Whatever completes a context. `max_context` bounds prompt + response, in ids.

    `speaks`: "ids", or "text" where a chat API tells none; such an engine reads `request.messages`.
    """

    max_context: int
    speaks: str

    async def complete(self, request: Request) -> Completion:
        """Sample a completion.

        Raises RequestFailed when this request failed for good, any other EngineError when the
        engine did.
        """
        ...

    async def close(self) -> None:
        """Release the model or the server."""
        ...
