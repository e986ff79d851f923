"""A pair, or one rollout of a group, on a terminal: what trains, after which context."""

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipeline.paint import CLIPPED, Look, facts, numbered, painted, spoken
from pipeline.pieces import Ids, Numbers, pieces_of
from pipeline.records import FloatArray, GroupExample, Member, PairExample, TrainingSequence
from pipeline.visible import in_line

SIDES = ("chosen", "reject")


def pair_page(pair: PairExample, look: Look) -> Iterator[RenderableType]:
    """Show a pair: figures, what both saw, each side after the fork, where the turns are."""
    members = dict(zip(SIDES, (pair.chosen, pair.reject), strict=True))
    yield _pair_heading(pair)
    yield facts(SIDES, _member_facts(list(members.values())))
    if all(len(member.sequence.segments) == 1 for member in members.values()):
        if pair.prefix_length:
            yield _shared(pair, look)
        tails: list[RenderableType] = [
            _tail(member.sequence, pair.prefix_length, look, side)
            for side, member in members.items()
        ]
    else:
        tails = [
            _segments(member.sequence, pair.prefix_length, look, side)
            for side, member in members.items()
        ]
    yield _beside(tails, look)
    yield _spans({side: member.sequence for side, member in members.items()})
    said = [_messages(pair, member, side, look) for side, member in members.items()]
    if any(said):
        yield _beside([one or Text("") for one in said], look)


def group_page(example: GroupExample, look: Look) -> Iterator[RenderableType]:
    """Show one rollout of a group."""
    prompt = f"prompt {in_line(example.prompt_id)}"
    yield Text(f"{prompt} · sample {example.sample}", style="bold")
    sequence = example.sequence
    rows: dict[str, Sequence[object]] = {"reward": [example.reward]}
    rows["advantage, mean"] = [_mean(example.advantage)]
    yield facts([""], rows | _sequence_facts([sequence], [example]))
    whole = len(sequence.segments) == 1
    yield (_tail(sequence, 0, look, "said") if whole else _segments(sequence, None, look, "said"))
    yield _spans({"": sequence})


def _pair_heading(pair: PairExample) -> Text:
    parts = f"parts at turn {pair.branch_turn} (h)"
    if pair.branch_turn is None:
        parts = "parts where the first answers begin"
    gap = pair.chosen.reward - pair.reject.reward
    return Text(
        f"prompt {in_line(pair.prompt_id)} · {parts} · scored at turn {pair.score_turn} (L) · "
        f"{pair.prefix_length} ids shared · reward gap {gap:.6g}",
        style="bold",
    )


def _member_facts(members: Sequence[Member]) -> dict[str, Sequence[object]]:
    rows: dict[str, Sequence[object]] = {
        "sample": [member.sample for member in members],
        "reward": [member.reward for member in members],
    }
    return rows | _sequence_facts([member.sequence for member in members], members)


def _sequence_facts(
    sequences: Sequence[TrainingSequence], holders: Sequence[Member | GroupExample]
) -> dict[str, Sequence[object]]:
    rows: dict[str, Sequence[object]] = {
        "ids": [len(sequence.ids) for sequence in sequences],
        "ids that train": [int(sequence.mask.sum()) for sequence in sequences],
        "segments": [len(sequence.segments) for sequence in sequences],
        "log-prob when sampled, mean": [_mean(one.sample_logprob) for one in holders],
    }
    for name in ("old", "ref"):
        values = [getattr(one, f"{name}_logprob") for one in holders]
        if any(value is not None for value in values):
            rows[f"{name} log-prob, mean"] = [_mean(value) for value in values]
    return rows


def _mean(values: FloatArray | None) -> float | None:
    return None if values is None or not len(values) else float(np.mean(values))


def _text(
    row: Ids, window: tuple[int, int], look: Look, side: str, fork: int | None
) -> RenderableType:
    cuts = [] if fork is None else [fork]
    pieces = pieces_of(row, window, look.decoder, look.limit, cuts)
    if look.ids:
        return numbered(pieces, look, side, row.ids, fork)
    return painted(pieces, look, side, fork)


def _shared(pair: PairExample, look: Look) -> Panel:
    """Show the ids before the fork; those that train there train on both sides."""
    row = Ids(pair.chosen.sequence.ids, pair.chosen.sequence.mask)
    text = _text(row, (0, pair.prefix_length), look, "both", None)
    return Panel(text, title=f"both · ids 0 to {pair.prefix_length}", title_align="left")


def _tail(sequence: TrainingSequence, start: int, look: Look, side: str) -> Panel:
    row, end = Ids(sequence.ids, sequence.mask), len(sequence.ids)
    text = _text(row, (start, end), look, side, start or None)
    name = "" if side == "said" else f"{side} · "
    return Panel(text, title=f"{name}ids {start} to {end}", title_align="left")


def _segments(sequence: TrainingSequence, fork: int | None, look: Look, side: str) -> Table:
    """Show each segment after what it saw: the ids that were kept of all that came before."""
    grid, context = Table.grid(expand=True), np.empty(0, dtype=np.int32)
    name = "" if side == "said" else f"{side} · "
    for k, segment in enumerate(sequence.segments):
        own = slice(segment.start, segment.start + segment.length)
        context = np.concatenate([context[: segment.keep], sequence.ids[own]])
        mask = np.concatenate([np.zeros(segment.keep, np.uint8), sequence.mask[own]])
        inside = fork is not None and own.start <= fork < own.stop
        at = segment.keep + fork - own.start if inside and fork is not None else None
        text = _text(Ids(context, mask), (0, len(context)), look, side, at)
        title = f"{name}segment {k} · ids {own.start} to {own.stop}"
        saw = f"saw {segment.keep} ids before them" if segment.keep else "the first"
        grid.add_row(Panel(text, title=f"{title} · {saw}", title_align="left"))
    return grid


def _beside(parts: Sequence[RenderableType], look: Look) -> RenderableType:
    grid = Table.grid(expand=True)
    if look.wide:
        for _ in parts:
            grid.add_column(ratio=1)
        grid.add_row(*parts)
    else:
        grid.add_column()
        for part in parts:
            grid.add_row(part)
    return grid


def _spans(sequences: dict[str, TrainingSequence]) -> Table:
    """List where each policy turn's ids are, and how many of them train."""
    table = Table(box=None, padding=(0, 1), title="policy turns", title_justify="left")
    for name in ("", "turn", "from", "to", "ids", "train", "segment"):
        table.add_column(name, justify="left" if not name else "right")
    for side, sequence in sequences.items():
        starts = [segment.start for segment in sequence.segments]
        for span in sequence.spans:
            trained = int(sequence.mask[span.start : span.end].sum())
            segment = int(np.searchsorted(starts, span.start, side="right")) - 1
            figures = (span.turn, span.start, span.end, span.end - span.start, trained, segment)
            table.add_row(side, *map(str, figures), style="" if trained else "dim")
    return table


def _messages(pair: PairExample, member: Member, side: str, look: Look) -> RenderableType | None:
    """Show what was said after the ids end, up to the score turn: the reward read it.

    Where ids are numbers, everything that was said.
    """
    policy = _policy_turns(pair, member)
    last = max((span.turn for span in member.sequence.spans), default=-1)
    start = policy[last] + 1 if 0 <= last < len(policy) else len(member.messages)
    title, trained = "what came after, which doesn't train", _trained(member.sequence)
    if isinstance(look.decoder, Numbers):
        start, title = 0, "what was said"
    trains = {at for turn, at in enumerate(policy) if turn in trained}
    lines = [
        spoken(message, i in trains, look, CLIPPED)
        for i, message in enumerate(member.messages)
        if i >= start
    ]
    if not lines:
        return None
    text = Text("\n", overflow="fold").join(lines)
    return Panel(text, title=f"{side} · {title}", title_align="left", border_style="dim")


def _trained(sequence: TrainingSequence) -> set[int]:
    return {span.turn for span in sequence.spans if sequence.mask[span.start : span.end].any()}


def _policy_turns(pair: PairExample, member: Member) -> list[int]:
    """Return where the policy's turns are: the last ones, since an opening may hold others."""
    spoken_at = [i for i, one in enumerate(member.messages) if one["role"] == "assistant"]
    return spoken_at[-(pair.score_turn + 1) :]
