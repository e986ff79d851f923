"""The engine seam: ids in, ids and their log-probs out, with the reason why it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import EngineError
from pipeline.records import Message

if TYPE_CHECKING:
    from pipeline.engines.rounds import Rounds

__all__ = ["Completion", "Engine", "EngineError", "EngineOptions", "Request", "Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a party samples. `temperature` 0 is greedy; `top_k` 0 is off."""

    temperature: float = 0.8
    max_tokens: int = 1024
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

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
class Completion:
    """Sampled ids, ending with a stop token only if it was sampled.

    `logprobs`: one float for each id, of the tempered distribution sampled from (natural log); None
    where the engine renormalised it (top_p, top_k, min_p, greedy). `finish_reason`: "stop" or
    "length".
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs to start; each reads the fields that concern it.

    `rounds` is shared by the engines of a stage. `urls`: attach to servers instead of starting one.
    `log_dir`: where a started server's log goes. `gpus`: what it sees, as CUDA_VISIBLE_DEVICES.
    `max_model_len` 0: the model's own context.
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


class Engine(Protocol):
    """Whatever completes ids. `max_context` bounds prompt + response, in ids."""

    max_context: int

    async def complete(self, request: Request) -> Completion:
        """Sample a completion. Raises EngineError when the engine or its server fails."""
        ...

    async def close(self) -> None:
        """Release the model or the server."""
        ...
