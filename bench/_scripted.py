"""What the scripted engine says in benchmarks: something that costs nothing to find."""

from typing import Any


def seven(messages: Any, draw: Any) -> str:
    """Say 7, whatever was said."""
    return "7"
