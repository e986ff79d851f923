"""Run a command that may not outlive whoever started it: `python guard.py COMMAND...`.

The stage holds the write end of our standard input and writes nothing. However the stage ends, also
by SIGKILL, the kernel closes that pipe; then the command's whole process group is ended. A parent
that watches works for grandchildren too, where PR_SET_PDEATHSIG reaches only the first process.
Imports only the standard library, so that it costs no start-up time.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

# Ctrl-C must end a stage with two servers within five seconds.
GRACE_S = 2.0


def run(command: list[str]) -> int:
    """Start `command` in its own session; return its exit code, 128 + n where signal n ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _signal_group(child.pid, signal.SIGTERM))
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    code = child.wait()
    # Workers that outlive a crashed server hold the GPU's memory.
    _signal_group(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: subprocess.Popen) -> None:
    # Not sys.stdin: its lock, held by this thread, would abort the interpreter's shutdown.
    while os.read(0, 4096):
        pass
    _signal_group(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal_group(child.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
