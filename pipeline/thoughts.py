"""What a model thought, told from what it said: others may read only the latter."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records import Message

THINK, END_THINK = THINK_TAGS = ("<think>", "</think>")
"""What models write around a thought; DeepSeek-R1, Qwen3 and their kin share the spelling."""


def parted(text: str) -> tuple[str | None, str]:
    """Part what a model said into its thought, None where there is none, and its answer.

    A thought ends at the last `</think>`, as it does for the templates. One that was cut has no
    end, and then no answer follows it; whatever was said before it counts.
    """
    thought, ended, answer = text.rpartition(END_THINK)
    if ended:
        return thought.replace(THINK, "", 1).strip("\n"), answer.lstrip("\n")
    answer, begun, thought = text.partition(THINK)
    return (thought.strip("\n"), answer.strip("\n")) if begun else (None, text)


def spoken(message: Mapping[str, Any]) -> str:
    """Return what others may read of a message: of an assistant's content, no thoughts."""
    content = message.get("content") or ""
    return parted(content)[1] if message.get("role") == "assistant" else content


def heard(messages: Sequence[Message]) -> list[Message]:
    """Return messages as others hear them: without what the assistant thought."""
    return [_heard(message) for message in messages]


def _heard(message: Message) -> Message:
    if message.get("role") != "assistant" or not message.get("content"):
        return message
    rest = message | Message(content=spoken(message))
    rest.pop("reasoning_content", None)
    return rest
