"""A model plays the user: it says why it would ask, then asks (REFUEL setting one).

The user model reads the dialogue as text inside one message. Only what it writes after the last
`Question:` of its answer becomes a user turn; a reply without one, or one cut by length, is asked
for again with another seed, and after `MAX_TRIES` the dialogue ends as `no_question`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import Completion, Engine, Request, Sampling
from pipeline.environments.base import Dialogue, End, Environment
from pipeline.errors import RowError
from pipeline.records import USER_RETRIES, Message
from pipeline.seeds import seed_for
from pipeline.thoughts import spoken

MAX_TRIES = 3
MARKER = "Question:"
_INSTRUCTIONS = """You are the user of a chat assistant. Here is your conversation so far.

{dialogue}

Write what you would ask the assistant next. Stay in the role of the user; do not answer for the \
assistant. Reply in two parts and nothing else:
Justification: one or two sentences on why you ask this now.
Question: your next message to the assistant."""
_ENDING = """
When you have nothing more to ask, write this instead of your next message:
Question: {stop_phrase}"""


@dataclass(frozen=True, slots=True)
class User:
    """The user model: an engine, how it samples, and what it is told.

    `chat`: its template; None where the engine speaks text. `system_prompt`: put first.
    `stop_phrase`: a question that holds it ends the dialogue; "" is none.
    """

    engine: Engine
    chat: Any
    sampling: Sampling
    system_prompt: str = ""
    stop_phrase: str = ""


def question_of(text: str) -> str | None:
    """Return what follows the last `Question:`, stripped; None where there is nothing."""
    _, found, question = text.rpartition(MARKER)
    return question.strip() or None if found else None


def instructions(messages: Sequence[Message], stop_phrase: str = "") -> Message:
    """Return the message that the user model reads, without system messages and thoughts."""
    lines = [
        f"{message['role'].capitalize()}: {_indented(spoken(message))}"
        for message in messages
        if message["role"] in ("user", "assistant")
    ]
    told = _INSTRUCTIONS.format(dialogue="\n\n".join(lines))
    ending = _ENDING.format(stop_phrase=stop_phrase) if stop_phrase else ""
    return Message(role="user", content=told + ending)


def _indented(text: str) -> str:
    """Indent all lines but the first: no message can write a line that looks like another's."""
    return "\n    ".join(text.splitlines())


class SimulatedUser:
    """Asks the user model for the next user turn."""

    def __init__(self, user: User) -> None:
        self.user = user
        told = user.system_prompt
        self._told = (Message(role="system", content=told),) if told else ()

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        """Return one user message, or the end: `stop_phrase`, `no_question`, `user_context_full`.

        Where the user model's template refuses the message, the end is `user_template_error`.
        """
        messages = (*self._told, instructions(dialogue.messages, self.user.stop_phrase))
        ids = self._ids(messages)
        if isinstance(ids, End):
            return ids
        for attempt in range(MAX_TRIES):
            completion = await self._ask(dialogue, messages, ids, attempt)
            question = question_of(self._answer(completion, ids))
            if question and completion.finish_reason == "stop":
                return self._said(question)
            # By turn, so that a fork can tell its trunk's retries from its sibling's.
            retries = dialogue.info.get(USER_RETRIES, {})
            dialogue.info[USER_RETRIES] = retries | {str(len(dialogue.turns)): attempt + 1}
        return End("no_question")

    def _ids(self, messages: Sequence[Message]) -> list[int] | End:
        """Encode what the user model reads; a text engine's server does that itself."""
        if self.user.chat is None:
            return []
        try:
            ids: list[int] = self.user.chat.prompt(messages)
        except RowError as error:
            return End(f"user_{error.reason}")
        return End("user_context_full") if len(ids) >= self.user.engine.max_context else ids

    def _answer(self, completion: Completion, ids: Sequence[int]) -> str:
        """Return what the user model said, up to its stop string and without its thoughts."""
        if self.user.chat is None:
            message = Message(role="assistant", content=completion.text)
        else:
            message = self.user.chat.message(completion.ids, ids)
        text = spoken(message)
        for stop in self.user.sampling.stop:
            text = text.partition(stop)[0]
        return text

    def _said(self, question: str) -> list[Message] | End:
        if self.user.stop_phrase and self.user.stop_phrase in question:
            return End("stop_phrase")
        return [Message(role="user", content=question)]

    async def _ask(
        self, dialogue: Dialogue, messages: tuple[Message, ...], ids: list[int], attempt: int
    ) -> Completion:
        prompt_id, sample, turn = dialogue.key
        request = Request(
            ids=ids,
            seed=seed_for(dialogue.run_seed, prompt_id, sample, turn, f"user-{attempt}"),
            sampling=self.user.sampling,
            stop_ids=() if self.user.chat is None else self.user.chat.stop_ids,
            key=dialogue.key,
            messages=messages,
        )
        return await self.user.engine.complete(request)


def build(config: object, user: User) -> Environment:
    """Make the environment around the user model that the stage loaded."""
    return SimulatedUser(user)
