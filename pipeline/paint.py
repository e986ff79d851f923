"""Pieces of ids -> text for a terminal: colours, or marks where there are none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from pipeline.pieces import Decoder, Piece
from pipeline.visible import NEWLINE, SPECIAL, TRAINED, in_line, visible

STYLES = {"chosen": "bold green", "reject": "bold red", "both": "bold cyan", "said": "bold green"}
FORK = "⑂"
SIDE_BY_SIDE = 120
"""Columns of a terminal that is wide enough for two texts."""
CLIPPED = 400
"""Characters of a message that are shown where it isn't what the row is about."""


@dataclass(frozen=True, slots=True)
class Look:
    """How rows are shown: `limit` ids of a text, `ids` beside it, `width` columns."""

    decoder: Decoder
    colour: bool
    width: int
    limit: int
    ids: bool = False

    @property
    def wide(self) -> bool:
        """Whether two texts fit beside each other."""
        return self.width >= SIDE_BY_SIDE


def legend(look: Look) -> str:
    """Say what the marks are, where colours don't."""
    trains, special = ("in colour", "dim") if look.colour else map(" ".join, (TRAINED, SPECIAL))
    return f"Trained {trains}, special ids {special}, fork {FORK}, line end {NEWLINE}."


def painted(pieces: Sequence[Piece], look: Look, side: str, fork: int | None = None) -> Text:
    """Write pieces: what trains in the side's style, or in marks where there is no colour."""
    text, inside = Text(overflow="fold"), False
    for piece in pieces:
        if inside and not piece.trained and not look.colour:
            text.append(TRAINED[1])
        if piece.start == fork:
            text.append(FORK, style="bold yellow")
        if piece.trained and not inside and not look.colour:
            text.append(TRAINED[0])
        inside = piece.trained
        text.append_text(_piece(piece, look, side))
    if inside and not look.colour:
        text.append(TRAINED[1])
    return text


def _piece(piece: Piece, look: Look, side: str) -> Text:
    style = STYLES[side] if piece.trained else ""
    if piece.kind == "elided":
        return Text(piece.text, style="dim italic")
    if piece.kind == "special":
        name = in_line(piece.text)
        return Text(name if look.colour else name.join(SPECIAL), style=f"{style} dim".strip())
    text = Text(visible(piece.text), style=style)
    text.highlight_regex(NEWLINE, "dim")
    return text


def numbered(
    pieces: Sequence[Piece], look: Look, side: str, ids: Sequence[int], fork: int | None = None
) -> Table:
    """Write pieces with their places and their ids beside them."""
    table = Table(box=None, padding=(0, 1), expand=True)
    table.add_column("at", justify="right", style="dim", no_wrap=True)
    table.add_column("text", ratio=3, overflow="fold")
    table.add_column("ids", ratio=2, style="dim", overflow="fold")
    for piece in pieces:
        numbers = "" if piece.kind == "elided" else " ".join(map(str, ids[piece.start : piece.end]))
        table.add_row(str(piece.start), painted([piece], look, side, fork), numbers)
    return table


def spoken(message: Mapping[str, object], policy: bool, look: Look, clip: int) -> Text:
    """Write a message: its role, and whatever it holds; a policy's in the style of what trains."""
    role = Text(f"{in_line(str(message['role']))}: ", style="bold dim" if look.colour else "")
    whole = "\n".join(
        (f"{name}: {value}" if name != "content" else str(value))
        for name, value in message.items()
        if name != "role" and value
    )
    shown = whole if len(whole) <= clip else f"{whole[:clip]} … {len(whole) - clip:,} more"
    text = Text(visible(shown), style=STYLES["said"] if policy else "")
    if policy and not look.colour:
        text = Text.assemble(TRAINED[0], text, TRAINED[1])
    return Text.assemble(role, text, overflow="fold")


def facts(columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> Table:
    """Write figures in a table: a row for each name, a column for each side."""
    table = Table(box=None, padding=(0, 1), show_header=any(columns))
    table.add_column("", style="dim")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_value(value) for value in values))
    return table


def _value(value: object) -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text(f"{value:.6g}" if isinstance(value, float) else in_line(str(value)))
