"""Time and memory of a piece of work. A clock starts where the work does, and may stop twice."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch

# glibc keeps freed blocks for later, the more the larger they were. With these every large block is
# a mapping of its own, and the resident set follows what is allocated.
EAGER_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


class Clock(Protocol):
    """What a way calls around the work that counts."""

    def start(self) -> None: ...

    def stop(self, share: float = 1.0) -> None:
        """Add what passed since the start or the last stop; `share` of it counts."""
        ...


class Stopwatch:
    """Seconds, with the device's work finished at both ends."""

    def __init__(self) -> None:
        """Start at 0."""
        self.seconds = 0.0
        self._since = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._since = _finished_at()

    def stop(self, share: float = 1.0) -> None:
        """Count `share` of the seconds since the start or the last stop."""
        now = _finished_at()
        self.seconds += share * (now - self._since)
        self._since = now


def _finished_at() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Bytes at the peak above the model, its gradients and the optimizer's state.

    On a GPU of what is allocated, else of this process's resident set.
    """

    def __init__(self, parameters: Callable[[], Iterable[torch.nn.Parameter]]) -> None:
        """Take the parameters when the work starts: not before they are where they stay."""
        self.parameters = parameters
        self.peak_bytes = 0
        self._base = 0

    def start(self) -> None:
        """Let every parameter have a gradient, and measure from there."""
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # proc(5): 5 resets the peak of the resident set to its present value.
        Path("/proc/self/clear_refs").write_text("5")
        self._base = _status("VmRSS")

    def stop(self, share: float = 1.0) -> None:
        """Take the peak so far."""
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
        self.peak_bytes = max(self.peak_bytes, peak - self._base)


def _status(name: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
