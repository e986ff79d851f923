"""Run a stage as a user does, and tell what it took: time, processor time, memory at the peak."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GENERATE = Path(__file__).parents[1] / "stages" / "generate.py"
POLL_S = 0.02
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Taken:
    """What a process took, without its children.

    `cpu`: pairs (moment, processor seconds so far), a moment being one of the machine's monotonic
    clock, which all processes share.
    """

    wall_s: float
    peak_rss_mb: float
    cpu: list[tuple[float, float]]

    @property
    def cpu_s(self) -> float:
        return self.cpu[-1][1]

    def cpu_between(self, start_s: float, end_s: float) -> float:
        """Return the processor seconds between two moments."""
        moments, seconds = zip(*self.cpu, strict=True)
        before, after = np.interp([start_s, end_s], moments, seconds)
        return float(after - before)


def generate(work: Path, env: Mapping[str, str] | None = None, **flags: object) -> Taken:
    """Run stages/generate.py into `work`/out with these flags.

    What it prints goes to `work`/stage.log. Raises AssertionError when it fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    told = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(GENERATE), f"--output_repo={work / 'out'}", *told]
    log = work / "stage.log"
    with log.open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **(env or {})}
        )
        peak_rss_mb, cpu = watch(process)
    assert process.returncode == 0, f"{' '.join(command)}\n{log.read_text()[-3000:]}"
    return Taken(cpu[-1][0] - started, peak_rss_mb, cpu)


def watch(process: subprocess.Popen) -> tuple[float, list[tuple[float, float]]]:
    """Wait for a process; return its peak memory in MB and its processor seconds over time.

    VmHWM and not wait4's ru_maxrss: that begins with the memory of whoever started the process.
    """
    folder, peak, cpu = Path(f"/proc/{process.pid}"), 0.0, []
    while True:
        if found := re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text()):
            peak = max(peak, int(found[1]) / 1e3)
        user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        now = time.monotonic()
        cpu.append((now, (int(user) + int(system)) / _TICKS_PER_S))
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(code)
            return peak, [*cpu, (now, usage.ru_utime + usage.ru_stime)]
        time.sleep(POLL_S)
