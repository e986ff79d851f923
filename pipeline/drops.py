"""Rows that a stage leaves out, written as it goes: `dropped.jsonl`, and the counts by reason."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.journal import Journal


class Drops:
    """The dropped rows of one run, on disk; in memory there are only the counts."""

    def __init__(self, path: Path) -> None:
        """Begin anew, whatever an earlier run has left at this place."""
        path.unlink(missing_ok=True)
        self.path = path
        self._journal = Journal(path)
        self._reasons: Counter[str] = Counter()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows, each with its `reason`."""
        for row in rows:
            self._journal.append(row)
            self._reasons[row["reason"]] += 1

    def close(self) -> dict[str, int]:
        """End writing; return the counts by reason, the commonest first."""
        self._journal.close()
        return dict(sorted(self._reasons.items(), key=lambda item: (-item[1], item[0])))
