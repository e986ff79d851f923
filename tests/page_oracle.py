"""Whole dialogues encoded one by one, every page rendered anew: what fast ways must equal.

Nothing is shared with the library but how a template is rendered and look-alikes are hidden: three
pages for each assistant turn, and offsets from a copy of the tokenizer without post-processor.
"""

import re
from typing import Any

from pipeline.chat import Chat
from pipeline.dialogues import Messages, clean, mark, spells, tool_schemas
from pipeline.errors import RowError

Answer = tuple[list[int], list[tuple[int, int]]] | str


def encoded_slowly(chat: Chat, messages: Messages, tools: str | None) -> Answer:
    """Return (ids, spans) of a dialogue, or the reason why it can't be used."""
    try:
        return _encoded(chat, messages, tools)
    except RowError as error:
        return error.reason


def _encoded(
    chat: Chat, messages: Messages, tools: str | None
) -> tuple[list[int], list[tuple[int, int]]]:
    said, schemas = clean(messages), tool_schemas(tools)
    cover = chat._shield.cover([said, schemas])
    said, schemas = cover.hide(said), cover.hide(schemas)
    page = chat._render(said, schemas, generation_prompt=False)
    encoding = cover.encode(page)
    turns = [
        _turn(chat, page, said, i, schemas) for i, m in enumerate(said) if m["role"] == "assistant"
    ]
    spans = [
        _tokens(encoding.offsets, len(cover.spell(page[:start])), len(cover.spell(page[:end])))
        for start, end in turns
    ]
    return encoding.ids, spans


def _turn(
    chat: Chat, page: str, said: list[dict[str, Any]], turn: int, schemas: list[Any] | None
) -> tuple[int, int]:
    before = chat._render(said[:turn], schemas)
    marked, marker = mark(said, turn, page=page)
    lead, _, rest = chat._render(marked, schemas, generation_prompt=False).partition(marker)
    text = page[len(before) : len(page) - len(rest)]
    if page != before + text + rest or not spells(text, said[turn], lead.removeprefix(before)):
        raise RowError("span_unproven")
    stops = "|".join(re.escape(chat._text([id_])) for id_ in chat.stop_ids)
    ending = re.match(rf"\s*(?:{stops})", rest)
    return len(before), len(before) + len(text) + (ending.end() if ending else 0)


def _tokens(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Find the tokens of a stretch by going through all of them."""
    inside = [k for k, (a, b) in enumerate(offsets) if start <= a and b <= end]
    touched = [k for k, (a, b) in enumerate(offsets) if a < end and b > start]
    if not inside or inside != touched:
        raise RowError("span_unproven")
    return inside[0], inside[-1] + 1
