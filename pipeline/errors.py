"""The errors that a user can meet and mend; everything else is a bug or the machine."""


class DataError(ValueError):
    """Say what is wrong with an input, the value seen, and the next command to type."""


class EngineError(RuntimeError):
    """Say which engine failed and how; the stage stops, resumable. Never turned into a score."""


class RowError(Exception):
    """Say why one row can't be used: `reason` is counted, the text goes to dropped.jsonl."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
