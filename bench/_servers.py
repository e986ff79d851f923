"""Simulated servers as processes that end with whoever started them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from pipeline.engines import guard

SERVER = Path(__file__).with_name("_simulated_server.py")


class Simulated:
    """A simulated server: where it is, and what it counted."""

    def __init__(self, url: str, model: str) -> None:
        """Address a server that runs."""
        self.url, self.model = url, model

    def stats(self) -> dict[str, Any]:
        """Return the server's totals so far."""
        return httpx.get(f"{self.url}/stats", trust_env=False).raise_for_status().json()


@contextmanager
def simulated_server(model: str, **settings: Any) -> Iterator[Simulated]:
    """Serve `model` on a free port for as long as the block runs; settings are the server's."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, str(SERVER), f"--model={model}", *flags]
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, f"the server did not start: {command}"
        yield Simulated(url, model)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
