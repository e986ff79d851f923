"""Messages as other datasets spell them -> messages of ours; what is none raises RowError."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.dialogues import TOOLS_UNREADABLE, tool_schemas
from pipeline.errors import RowError
from pipeline.prompts import ROLES, NotADialogue, hh_messages
from pipeline.records import Message, ToolCall

NOT_A_DIALOGUE = "not_a_dialogue"
_ROLES = {**ROLES, "tool": "tool"}
_HH_OPENING = "\n\nHuman:"
_HH_ANSWER = "\n\nAssistant:"
_SHOWN = 60
"""Most characters of a value that an error repeats."""
_FIELDS = ("reasoning_content", "name", "tool_call_id")


def messages_of(value: Any) -> list[Message]:
    """Read a list of messages, a message alone, or HH's text. Raises RowError."""
    if isinstance(value, str):
        try:
            return hh_messages(value)
        except NotADialogue as error:
            raise RowError(NOT_A_DIALOGUE, str(error)) from None
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise RowError(NOT_A_DIALOGUE, f"no messages but {_shown(value)}")
    return [_message(item, i) for i, item in enumerate(items)]


def opening_of(value: Any) -> list[Message] | str:
    """Read a prompt: messages, a question of the user's, or HH's text up to an answer, as it is."""
    if isinstance(value, str):
        return value if is_hh(value) else [Message(role="user", content=value)]
    return messages_of(value)


def asked(opening: list[Message] | str) -> list[Message]:
    """Return the messages of a prompt."""
    if isinstance(opening, str):
        return messages_of(opening.rstrip().removesuffix(_HH_ANSWER))
    return opening


def is_hh(text: str) -> bool:
    """Say whether a text opens as HH's do."""
    return text.startswith(_HH_OPENING)


def continued(opening: list[Message] | str, value: Any) -> list[Message]:
    """Read what follows a prompt, or a dialogue that holds its prompt already. Raises RowError."""
    if isinstance(value, str):
        return _answered(opening, value)
    messages, before = messages_of(value), asked(opening)
    if messages[0]["role"] in ("assistant", "tool"):
        return [*before, *messages]
    # A prompt alone may be the question after a system message.
    if messages[: len(before)] == before or (len(before) == 1 and before[0] in messages):
        return messages
    raise RowError(NOT_A_DIALOGUE, "neither goes on from the prompt nor begins with it")


def _answered(opening: list[Message] | str, text: str) -> list[Message]:
    if is_hh(text):
        return continued(opening, messages_of(text))
    if isinstance(opening, str):
        return messages_of(opening.rstrip().removesuffix(_HH_ANSWER) + f"{_HH_ANSWER} {text}")
    return [*opening, Message(role="assistant", content=text)]


def _message(item: Any, place: int) -> Message:
    if not isinstance(item, dict):
        raise RowError(NOT_A_DIALOGUE, f"message {place} is {_shown(item)}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(NOT_A_DIALOGUE, f"message {place} has the role {_shown(role)}")
    more = {name: item[name] for name in _FIELDS if isinstance(item.get(name), str)}
    message = Message(role=_ROLES[role], content=content, **more)  # type: ignore[typeddict-item]
    if calls := item.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls, place)
    silent = content is None and message.keys() & {"tool_calls", "reasoning_content"}
    if not isinstance(content, str) and not silent:
        raise RowError(NOT_A_DIALOGUE, f"the content of message {place} is {_shown(content)}")
    return message


def _tool_calls(calls: Any, place: int) -> list[ToolCall]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(NOT_A_DIALOGUE, f"the tool calls of message {place} are {_shown(calls)}")
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Mapping[str, Any], place: int) -> ToolCall:
    """Read a call as OpenAI's API and TRL spell it, or as ours: {id, name, arguments}."""
    function = call.get("function") or call
    name = function.get("name") if isinstance(function, dict) else function
    if not isinstance(name, str) or not isinstance(function, dict):
        raise RowError(NOT_A_DIALOGUE, f"a tool call of message {place} names {_shown(name)}")
    arguments, number = function.get("arguments"), call.get("id")
    if not isinstance(arguments, str):
        arguments = _json(arguments or {}, NOT_A_DIALOGUE)
    return ToolCall(id="" if number is None else str(number), name=name, arguments=arguments)


def tools_of(value: Any) -> str | None:
    """Read tools: JSON, or a list of schemas. Raises RowError for anything else."""
    if value is None or isinstance(value, str):
        tool_schemas(value)
        return value or None
    tools = _json(value, TOOLS_UNREADABLE)
    tool_schemas(tools)
    return tools if value else None


def _json(value: Any, reason: str) -> str:
    try:
        return json.dumps(without_nulls(value), ensure_ascii=False)
    except TypeError as error:  # Arrow also holds bytes and dates
        raise RowError(reason, str(error)) from None


def without_nulls(value: Any) -> Any:
    """Drop the fields that Arrow filled in because other rows have them."""
    if isinstance(value, dict):
        return {k: without_nulls(item) for k, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _shown(value: Any) -> str:
    """Show a value in an error, where that is short."""
    short = value is None or isinstance(value, str | int)
    return repr(value)[:_SHOWN] if short else f"a {type(value).__name__}"
