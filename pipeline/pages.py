"""Where each assistant turn stands on the page of a whole dialogue, in characters.

The template itself says it: a turn starts where the generation prompt ends, and ends where the page
goes on as it does after any other content. Of a template that doesn't look at contents this is
found once for all dialogues of the same roles and tools.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Any, Protocol

from pipeline.dialogues import mark, spells
from pipeline.errors import RowError
from pipeline.shield import strings_of, unused_characters
from pipeline.template_sight import needles_of

SPAN_UNPROVEN = "span_unproven"
SHAPES = 256
"""Outlines that are kept: tools of their own make a shape of nearly every dialogue."""


class Render(Protocol):
    """Render messages with tools; raises RowError where the template refuses them."""

    def __call__(
        self, messages: list[dict[str, Any]], tools: list | None, generation_prompt: bool = True
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered dialogue, and the (start, end) of each assistant turn, its end included."""

    text: str
    turns: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Outline:
    """The page of all dialogues of a shape.

    `between`: the template's own text before, between and after contents; `holes`: whose contents
    they are; `turns`: for each assistant turn, its hole and how many characters before it it
    starts.
    """

    between: list[str]
    holes: list[int]
    turns: list[tuple[int, int]]

    def turns_on(self, page: str, contents: Sequence[str]) -> list[tuple[int, int]] | None:
        """Return where turns start and their contents end; None on a page that isn't of this."""
        said = [contents[hole] for hole in self.holes]
        if "".join(chain(*zip_longest(self.between, said, fillvalue=""))) != page:
            return None
        ends, place = [], 0
        for own, content in zip(self.between, said, strict=False):
            place += len(own) + len(content)
            ends.append(place)
        return [(ends[k] - len(said[k]) - lead, ends[k]) for k, lead in self.turns]


class Pages:
    """Renders dialogues and finds the assistant's turns on them.

    `ending`: matches what ends a turn, which belongs to it.
    """

    def __init__(self, render: Render, template: object, ending: re.Pattern[str]) -> None:
        self._render = render
        self._template = template if isinstance(template, str) else ""
        self._needles = needles_of(template) if isinstance(template, str) else None
        self._ending = ending
        self._outline = lru_cache(maxsize=SHAPES)(self._new_outline)

    def page(self, said: list[dict[str, Any]], tools: list | None) -> Page:
        """Render a dialogue whole. Raises RowError where the template refuses it, or writes a turn
        in a way that doesn't show where it starts and ends.
        """
        text = self._render(said, tools, generation_prompt=False)
        turns = self._recalled(text, said, tools)
        if turns is None:
            turns = self._located(text, said, tools)
        return Page(text, [(start, self._with_ending(text, end)) for start, end in turns])

    def _with_ending(self, text: str, end: int) -> int:
        found = self._ending.match(text, end)
        return found.end() if found else end

    def _recalled(
        self, text: str, said: list[dict[str, Any]], tools: list | None
    ) -> list[tuple[int, int]] | None:
        """Locate the turns by the shape of their dialogue, where that is enough to know."""
        if self._needles is None:
            return None
        if not all(_unseen(message, self._needles) for message in said):
            return None
        contents = [message["content"] for message in said]
        outline = self._outline(
            tuple(message["role"] for message in said), json.dumps(tools) if tools else None
        )
        return outline.turns_on(text, contents) if outline else None

    def _new_outline(self, roles: tuple[str, ...], tools: str | None) -> Outline | None:
        """Return the outline of a shape, or None where the template doesn't show its turns."""
        schemas = json.loads(tools) if tools else None
        taken = "".join([*strings_of(schemas), *roles, self._template])
        # A quote, which JSON writes otherwise: then the marker isn't found as it is.
        markers = [f'{char}"' for char in unused_characters(taken, len(roles))]
        if any(needle in marker for needle in self._needles or () for marker in markers):
            return None
        said = [
            {"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)
        ]
        try:
            page = self._render(said, schemas, generation_prompt=False)
            turns = self._marked_turns(page, said, schemas)
        except RowError:
            return None
        parts = re.split(f"({'|'.join(markers)})", page)
        holes = [markers.index(marker) for marker in parts[1::2]]
        if any(marker[0] in own for own in parts[::2] for marker in markers):
            return None
        return Outline(parts[::2], holes, [(holes.index(i), lead) for i, lead in turns])

    def _marked_turns(
        self, page: str, said: list[dict[str, Any]], schemas: list | None
    ) -> list[tuple[int, int]]:
        """Return for each assistant turn its message and its characters before the marker."""
        turns = []
        for i, message in enumerate(said):
            if message["role"] == "assistant":
                lead, *rest = page.split(message["content"])
                before = self._render(said[:i], schemas)
                own = lead.removeprefix(before)
                if len(rest) != 1 or not lead.startswith(before) or _holds(own, said):
                    raise RowError(SPAN_UNPROVEN, f"message {i}")
                turns.append((i, len(own)))
        return turns

    def _located(
        self, text: str, said: list[dict[str, Any]], tools: list | None
    ) -> list[tuple[int, int]]:
        spoken = [i for i, message in enumerate(said) if message["role"] == "assistant"]
        return [self._turn(text, said, i, tools) for i in spoken]

    def _turn(
        self, page: str, said: list[dict[str, Any]], turn: int, tools: list | None
    ) -> tuple[int, int]:
        """Locate an assistant message on its page: where it starts, and where its content ends."""
        before = self._render(said[:turn], tools)
        marked, marker = mark(said, turn, page=page)
        lead, _, rest = self._render(marked, tools, generation_prompt=False).partition(marker)
        text = page[len(before) : len(page) - len(rest)]
        known = page.startswith(before) and page == before + text + rest
        if not known or not spells(text, said[turn], lead.removeprefix(before)):
            raise RowError(SPAN_UNPROVEN, f"message {turn} isn't on the page as it was said")
        return len(before), len(before) + len(text)


def _unseen(message: dict[str, Any], needles: Sequence[str]) -> bool:
    """Test that a message has nothing but a content in which templates find nothing."""
    content = message.get("content")
    if not isinstance(content, str) or message.keys() != {"role", "content"}:
        return False
    if not content or content[0].isspace() or content[-1].isspace():
        return False
    return not any(needle in content for needle in needles)


def _holds(text: str, said: list[dict[str, Any]]) -> bool:
    return any(message["content"] in text for message in said)
