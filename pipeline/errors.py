"""The two errors that a user can meet and mend; everything else is a bug or the machine."""


class DataError(ValueError):
    """Say what is wrong with an input, the value seen, and the next command to type."""


class EngineError(RuntimeError):
    """Say which engine failed and how; the stage stops, resumable. Never turned into a score."""
