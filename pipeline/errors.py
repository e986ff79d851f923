"""The errors that a user can meet and mend; everything else is a bug or the machine."""


class DataError(ValueError):
    """Say what is wrong with an input, the value seen, and the next command to type."""


class EngineError(RuntimeError):
    """Say which engine failed and how; the stage stops, resumable. Never turned into a score."""


class RequestFailed(EngineError):
    """Say why one request failed for good, after its retries; the others may go on.

    `reason` becomes its rollout's `end_reason`: `server_lost` (no answer, 429, 5xx, timeouts) or
    `server_refused` (any other answer that can't be used).
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class RowError(Exception):
    """Say why one row can't be used: `reason` is counted, the text goes to dropped.jsonl."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
