"""A rollout on a terminal: its turns with finish reasons and rewards, what was seen and said."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipeline.filters import policy_messages
from pipeline.paint import Look, numbered, painted, spoken
from pipeline.pieces import Ids, Numbers, pieces_of
from pipeline.records import NO_SCORE, Rollout, Turn
from pipeline.visible import in_line, visible

CHARACTERS_AN_ID = 4
"""About so many in English text: a limit of ids for text without any."""


def rollout_page(rollout: Rollout, look: Look) -> Iterator[RenderableType]:
    """Show a rollout; by ids where a tokenizer reads them, else by its messages."""
    yield _heading(rollout)
    if rollout.turns or rollout.rewards:
        yield _turns(rollout)
    if rollout.turns and not isinstance(look.decoder, Numbers):
        yield from _by_ids(rollout, rollout.turns, look)
    else:
        policy, clip = policy_messages(rollout), look.limit * CHARACTERS_AN_ID
        for i, message in enumerate(rollout.messages):
            yield Panel(spoken(message, i in policy, look, clip))
    if rollout.info:
        info = json.dumps(rollout.info, ensure_ascii=False, sort_keys=True)
        yield Text(f"info: {visible(info)}", style="dim")


def _heading(rollout: Rollout) -> Text:
    said = [f"prompt {in_line(rollout.prompt_id)} · sample {rollout.sample}"]
    said += [f"parts at turn {rollout.branch_turn} (h)"] if rollout.branch_turn is not None else []
    said.append(f"scored at turn {rollout.score_turn} (L)")
    said += [in_line(text) for text in (rollout.status, rollout.end_reason) if text]
    if rollout.reward_model:
        said.append(f"reward model {in_line(rollout.reward_model)}")
    return Text(" · ".join(said), style="bold")


def _turns(rollout: Rollout) -> Table:
    table = Table(box=None, padding=(0, 1), title="policy turns", title_justify="left")
    names = ["turn", "kept", "new", "said", "ended", "log-prob", "reward"]
    parts = rollout.reward_parts or []
    for name in [*names, *(in_line(part.name) for part in parts), ""]:
        table.add_column(name, justify="right")
    turns: Sequence[Turn | None] = rollout.turns or [None] * len(rollout.rewards or [])
    for t, turn in enumerate(turns):
        marks = "h" * (t == rollout.branch_turn) + "L" * (t == rollout.score_turn)
        values = [_at(part.values, t) for part in parts]
        error = _at(rollout.reward_errors, t)
        shown = [*_turn_figures(turn), _score(_at(rollout.rewards, t)), *map(_score, values)]
        table.add_row(f"{marks} {t}", *shown, in_line(str(error)) if error else "")
    return table


def _turn_figures(turn: Turn | None) -> list[str]:
    if turn is None:
        return ["–"] * 5
    said = [len(turn.prompt_ids), len(turn.response_ids)]
    mean = f"{np.mean(turn.logprobs):.4f}" if turn.logprobs else "–"
    return [str(turn.keep), *map(str, said), in_line(turn.finish_reason), mean]


def _at(values: Sequence[object] | None, turn: int) -> object:
    return values[turn] if values is not None and turn < len(values) else None


def _score(value: object) -> str:
    if value is None:
        return "–"
    return "no score" if value == NO_SCORE else f"{value:.6g}"


def _by_ids(rollout: Rollout, turns: Sequence[Turn], look: Look) -> Iterator[RenderableType]:
    """Show for each turn the ids that were new in its context, and those that were sampled."""
    context: list[int] = []
    for t, turn in enumerate(turns):
        title = f"turn {t} · {in_line(turn.finish_reason)}"
        if turn.keep < len(context):
            title += f" · saw the first {turn.keep} of the {len(context)} ids before, then these"
        context = [*context[: turn.keep], *turn.prompt_ids, *turn.response_ids]
        mask = np.zeros(len(context), np.uint8)
        mask[turn.keep + len(turn.prompt_ids) :] = 1
        row = Ids(context, mask)
        pieces = pieces_of(row, (turn.keep, len(context)), look.decoder, look.limit)
        text = (
            numbered(pieces, look, "said", context) if look.ids else painted(pieces, look, "said")
        )
        yield Panel(text, title=title, title_align="left")
    last = policy_messages(rollout)[-1] if policy_messages(rollout) else -1
    for message in rollout.messages[last + 1 :]:
        yield Panel(spoken(message, False, look, look.limit * CHARACTERS_AN_ID))
