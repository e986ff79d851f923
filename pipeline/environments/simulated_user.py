"""A model plays the user: it says why it would ask, then asks (REFUEL setting one).

The user model reads the dialogue as text inside one message of its own chat template. Only what it
writes after the last `Question:` becomes a user turn; a reply without one is asked for again with
another seed, and after `MAX_TRIES` the dialogue ends as `no_question`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import Completion, Engine, Request, Sampling
from pipeline.environments.base import Dialogue, End, Environment
from pipeline.records import Message
from pipeline.seeds import seed_for

MAX_TRIES = 3
MARKER = "Question:"
_INSTRUCTIONS = """You are the user of a chat assistant. Here is your conversation so far.

{dialogue}

Write what you would ask the assistant next. Stay in the role of the user; do not answer for the \
assistant. Reply in two parts and nothing else:
Justification: one or two sentences on why you ask this now.
Question: your next message to the assistant."""


@dataclass(frozen=True, slots=True)
class User:
    """The user model: an engine, its chat template and how it samples."""

    engine: Engine
    chat: Any
    sampling: Sampling


def question_of(text: str) -> str | None:
    """Return what follows the last `Question:`, stripped; None where there is nothing."""
    _, found, question = text.rpartition(MARKER)
    return question.strip() or None if found else None


def instructions(messages: Sequence[Message]) -> Message:
    """Return the one message that the user model reads; system messages are not shown to it."""
    lines = [
        f"{message['role'].capitalize()}: {message.get('content') or ''}"
        for message in messages
        if message["role"] in ("user", "assistant")
    ]
    return Message(role="user", content=_INSTRUCTIONS.format(dialogue="\n\n".join(lines)))


class SimulatedUser:
    """Asks the user model for the next user turn."""

    def __init__(self, user: User) -> None:
        self.user = user

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        """Return one user message, or the end: `no_question`, `user_context_full`."""
        message = instructions(dialogue.messages)
        ids = self.user.chat.prompt([message])
        if len(ids) >= self.user.engine.max_context:
            return End("user_context_full")
        for attempt in range(MAX_TRIES):
            completion = await self._ask(dialogue, message, ids, attempt)
            question = question_of(self.user.chat.decode(completion.ids))
            if question and completion.finish_reason == "stop":
                return [Message(role="user", content=question)]
            # By turn, so that a fork can tell its trunk's retries from its sibling's.
            retries = dialogue.info.get("user_retries", {})
            dialogue.info["user_retries"] = retries | {str(len(dialogue.turns)): attempt + 1}
        return End("no_question")

    async def _ask(
        self, dialogue: Dialogue, message: Message, ids: list[int], attempt: int
    ) -> Completion:
        prompt_id, sample, turn = dialogue.key
        request = Request(
            ids=ids,
            seed=seed_for(dialogue.run_seed, prompt_id, sample, turn, f"user-{attempt}"),
            sampling=self.user.sampling,
            stop_ids=self.user.chat.stop_ids,
            key=dialogue.key,
            messages=(message,),
        )
        return await self.user.engine.complete(request)


def build(config: object, user: User) -> Environment:
    """Make the environment around the user model that the stage loaded."""
    return SimulatedUser(user)
