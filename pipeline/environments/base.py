"""The environment seam: what is said between two policy turns, or the end of the dialogue."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.records import Message, Turn


@dataclass(frozen=True, slots=True)
class End:
    """The environment ends the dialogue; `reason` becomes the rollout's `end_reason`."""

    reason: str


@dataclass(slots=True)
class Dialogue:
    """A dialogue in play. `context`: the ids that the policy has seen and said so far.

    `info` holds what the environment or the reward needs (role, ground truth, game, counters).
    Environments keep no state of their own: everything they need is here, so a dialogue resumes
    from its record.
    """

    run_seed: int
    prompt_id: str
    sample: int
    messages: list[Message]
    tools: str | None = None
    turns: list[Turn] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, int]:
        """Orders requests: prompt, sample, policy turn."""
        return self.prompt_id, self.sample, len(self.turns)

    def fork(self, sample: int) -> "Dialogue":
        """Copy the dialogue so far for another rollout of the same prompt."""
        return replace(
            self,
            sample=sample,
            messages=list(self.messages),
            turns=list(self.turns),
            context=list(self.context),
            info=dict(self.info),
        )


class Environment(Protocol):
    """Whoever answers the policy."""

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        """Return the messages before the next policy turn, or the end of the dialogue.

        Raises EngineError when a model behind the environment fails.
        """
        ...
