"""Pictures for cards and for the demo, as PNG bytes. matplotlib is imported where it draws."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def score_by_turn(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the mean score at each turn with its 95% interval, one line for each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for index, policy in enumerate(policies):
        mine = [row for row in rows if row["policy"] == policy]
        # A little apart, so that the intervals of one turn don't hide each other.
        shift = 0.05 * (index - (len(policies) - 1) / 2)
        axes.errorbar(
            [row["turn"] + 1 + shift for row in mine],
            [row["score"] for row in mine],
            yerr=[row["score_half_width"] for row in mine],
            label=policy,
            color=_shade(index, len(policies)),
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xticks(sorted({row["turn"] + 1 for row in rows}))
    axes.set_xlabel("turn")
    axes.set_ylabel("mean score (95% interval)")
    axes.grid(alpha=0.3)
    axes.legend(title="policy", fontsize=8)
    buffer = io.BytesIO()
    # No creation date and no version in the file, so the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _shade(index: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * index / max(count - 1, 1))
