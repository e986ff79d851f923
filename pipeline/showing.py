"""Rows of any repo of ours, or of published pairs -> pages for a terminal."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from pipeline.errors import DataError, RowError
from pipeline.paint import Look
from pipeline.published import is_published, pair_from_published
from pipeline.records import Rollout
from pipeline.rows import clean_message, group_from_row, pair_from_row, rollout_from_row
from pipeline.show_rollouts import rollout_page
from pipeline.show_sequences import group_page, pair_page
from pipeline.text_rows import TEXT_COLUMNS, rollouts_of_text
from pipeline.visible import in_line

PAIRS, GROUPS = {"chosen_token", "chosen_segments"}, {"token", "mask", "segments"}


def page_of(row: Mapping[str, Any], look: Look) -> Iterator[RenderableType]:
    """Show a row as what its columns say it is. DataError for a row of nothing that we know."""
    columns, values = set(row), dict(row)
    if columns >= PAIRS:
        yield from pair_page(pair_from_row(values), look)
    elif is_published(columns):
        yield from pair_page(pair_from_published(values), look)
    elif columns >= GROUPS:
        yield from group_page(group_from_row(values), look)
    elif "messages" in columns:
        yield from rollout_page(_rollout(values), look)
    elif columns >= set(TEXT_COLUMNS):
        for rollout in _texts(values):
            yield from rollout_page(rollout, look)
    else:
        raise DataError(
            "rows of rollouts, pairs and groups can be shown; these have the columns "
            + in_line(", ".join(row))
        )


def _rollout(row: dict[str, Any]) -> Rollout:
    """Read a rollout; of somebody's dialogue, what there is."""
    if "score_turn" in row:
        return rollout_from_row(row)
    messages = [clean_message(message) for message in row["messages"]]
    last = sum(message["role"] == "assistant" for message in messages) - 1
    return Rollout(str(row.get("prompt_id", "")), 0, messages, None, None, max(last, 0), "", "")


def _texts(row: dict[str, Any]) -> Iterable[Rollout]:
    try:
        return rollouts_of_text(row)
    except RowError as error:
        raise DataError(f"this row is no pair of dialogues: {error}") from None
