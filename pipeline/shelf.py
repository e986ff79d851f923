"""Prompts on disk in key order, and where the journal holds what was played of each.

A run of any size needs the same memory: sqlite keeps the text, numpy 16 bytes a prompt. The file is
made anew at each start from the source and the journal, so it need not survive anything.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.records import Prompt

_TABLES = """
CREATE TABLE prompts (place INTEGER PRIMARY KEY, id BLOB UNIQUE, content BLOB UNIQUE, body BLOB);
CREATE TABLE dropped (row INTEGER PRIMARY KEY, reason TEXT);
CREATE TABLE played (id BLOB, sample INTEGER, place INTEGER, turns INTEGER, cut INTEGER,
PRIMARY KEY (id, sample)) WITHOUT ROWID;
"""


class Played(NamedTuple):
    """A rollout in the journal: where its record begins, how many policy turns it has.

    `cut`: a server failed it, so that it is to be played on.
    """

    sample: int
    place: int
    turns: int
    cut: bool


class Shelf:
    """The prompts of a run. `rows`: rows of the source that were read.

    Ids are kept as bytes of UTF-8, whose order is that of Python's strings, lone surrogates too.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Begin with an empty one, at `path` or in memory."""
        if path is not None:
            path.unlink(missing_ok=True)
        # One thread at a time uses it; which one is the event loop's affair.
        self._db = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;"
            + _TABLES
        )
        self.rows = 0

    def add(self, prompt: Prompt, content: str) -> str | None:
        """Put a prompt up, or return why not: `duplicate`, `prompt_id_taken`.

        `content`: a hash of what a dialogue with this prompt depends on.
        """
        body = json.dumps([getattr(prompt, field.name) for field in fields(prompt)])
        put = self._db.execute(
            "INSERT OR IGNORE INTO prompts (id, content, body) VALUES (?, ?, ?)",
            (_key(prompt.prompt_id), _key(content), body.encode()),
        )
        if put.rowcount:
            return None
        same = self._db.execute("SELECT 1 FROM prompts WHERE content = ?", (_key(content),))
        return "duplicate" if same.fetchone() else "prompt_id_taken"

    def drop(self, row: int, reason: str) -> None:
        """Note a row of the source that is left out."""
        self._db.execute("INSERT INTO dropped VALUES (?, ?)", (row, reason))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Yield {"row": index, "reason": ...} in the order of the source."""
        for row, reason in self._db.execute("SELECT row, reason FROM dropped ORDER BY row"):
            yield {"row": row, "reason": reason}

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM prompts").fetchone()[0])

    def __iter__(self) -> Iterator[Prompt]:
        """Yield the prompts in key order."""
        return self.by_rank(lambda prompt_id: 0.0)

    def ids(self) -> Iterator[str]:
        """Yield the ids of the prompts in key order."""
        for (key,) in self._db.execute("SELECT id FROM prompts ORDER BY id"):
            yield _text(key)

    def by_rank(self, rank: Callable[[str], float]) -> Iterator[Prompt]:
        """Yield the prompts by rising `rank` of their ids, those of one rank in key order."""
        ordered = self._db.execute("SELECT place, id FROM prompts ORDER BY id")
        places = np.fromiter(
            ((place, rank(_text(key))) for place, key in ordered), dtype=np.dtype((np.float64, 2))
        )
        order = np.argsort(places[:, 1], kind="stable")
        for place in places[order, 0].astype(np.int64).tolist():
            (body,) = self._db.execute(
                "SELECT body FROM prompts WHERE place = ?", (place,)
            ).fetchone()
            yield Prompt(*json.loads(body))

    def note(self, prompt_id: str, played: Played) -> Played | None:
        """Note a record of the journal; return what was noted of its key before."""
        before = [known for known in self.played(prompt_id) if known.sample == played.sample]
        self._db.execute(
            "INSERT OR REPLACE INTO played VALUES (?, ?, ?, ?, ?)", (_key(prompt_id), *played)
        )
        return before[0] if before else None

    def played(self, prompt_id: str) -> list[Played]:
        """Return what the journal holds of a prompt, by sample."""
        found = self._db.execute(
            "SELECT sample, place, turns, cut FROM played WHERE id = ? ORDER BY sample",
            (_key(prompt_id),),
        )
        return [Played(sample, place, turns, bool(cut)) for sample, place, turns, cut in found]

    def places(self) -> Iterator[int]:
        """Yield where the record of each rollout begins, in key order."""
        for (place,) in self._db.execute("SELECT place FROM played ORDER BY id, sample"):
            yield place

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _key(prompt_id: str) -> bytes:
    return prompt_id.encode("utf-8", "surrogatepass")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")
