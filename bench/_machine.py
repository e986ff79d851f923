"""What figures depend on: the machine, its libraries, and how fast it multiplies matrices."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch


def describe(device: str, libraries: Sequence[str]) -> str:
    """Return the processor or the GPU, how busy the machine is, and versions."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    cores = f"{len(os.sched_getaffinity(0))} cores of {cpu}, load {os.getloadavg()[0]:.1f}"
    gpu = f"; {torch.cuda.get_device_name()}" if device == "cuda" else ""
    names = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{cores}{gpu}; Python {platform.python_version()}, {names}"


def matmul_flops(device: str, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Return the FLOP/s of the best of some products of square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
