"""The engine seam: ids in, ids and their log-probs out, with the reason why it stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import EngineError

__all__ = ["Completion", "Engine", "EngineError", "Request", "Sampling"]


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
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One completion: `ids` is the whole context, `key` orders requests of one round."""

    ids: Sequence[int]
    seed: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    key: tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids, ending with a stop token only if it was sampled.

    `logprobs`: one float for each id, of the tempered distribution sampled from (natural log); None
    where the engine renormalised it (top_p, top_k, min_p). `finish_reason`: "stop" or "length".
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


class Engine(Protocol):
    """Whatever completes ids. `max_context` bounds prompt + response, in ids."""

    max_context: int

    async def complete(self, request: Request) -> Completion:
        """Sample a completion. Raises EngineError when the engine or its server fails."""
        ...

    async def close(self) -> None:
        """Release the model or the server."""
        ...
