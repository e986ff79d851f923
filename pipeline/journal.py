"""JSON lines that survive a kill: what a stage has finished so far, one record a line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

_BLOCK = 1 << 16


class Journal:
    """An open journal. One writer for each file; a distributed stage has one file for each rank."""

    def __init__(self, path: Path) -> None:
        """Open for appending, after cutting off the line that a kill tore."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        truncate_torn_line(path)
        self._file = path.open("ab")
        self._reader = path.open("rb")

    def append(self, record: dict[str, Any]) -> int:
        """Add one record and return where it begins, for `read`.

        It survives a kill of the process at once, a power cut after `sync`.
        """
        start = self._file.tell()
        # One write of the whole line, ASCII so that a lone surrogate can't stop a stage.
        self._file.write(json.dumps(record, default=_plain).encode("ascii") + b"\n")
        self._file.flush()
        return start

    def read(self, start: int) -> dict[str, Any]:
        """Return the record that begins at byte `start`."""
        self._reader.seek(start)
        record: dict[str, Any] = json.loads(self._reader.readline())
        return record

    def sync(self) -> None:
        """Force what was appended to the disk; call it once for each batch."""
        os.fsync(self._file.fileno())

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in the order in which they were appended."""
        return read_journal(self.path)

    def places(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (where it begins, record) in the same order."""
        return read_places(self.path)

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            self.sync()
            self._file.close()
            self._reader.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a journal's records; a torn last line isn't one. DataError names a damaged line."""
    return (record for _, record in read_places(path))


def read_places(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (where it begins, record) from byte `start` on, which is where a record begins."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield start, json.loads(line)
                start += len(line)
            except ValueError as error:
                number = path.read_bytes().count(b"\n", 0, start) + 1
                raise DataError(
                    f"{path}, line {number} is damaged ({error}); the lines before it are sound. "
                    f"Delete that line and what follows, then run the same command again"
                ) from error


def truncate_torn_line(path: Path) -> None:
    """Cut a file after its last newline; without one, empty it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    # NumPy's arrays and scalars, which rows.pair_row and group_row hold.
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a journal can't hold {type(value).__name__}: {value!r}")
