"""Processes that share a stage's rows: each holds a lock of its own, so that a dead one is seen.

The system drops the lock of a process that dies, however it dies. On network folders this holds
where locks do (NFS with a lock service, Lustre with flock); where they don't reach other machines,
a journal that grows is the sign of life, and a death is seen only after `PATIENCE_S`.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.claims import rank
from pipeline.errors import DataError, EngineError
from pipeline.manifest import MANIFEST, command_line

PATIENCE_S = 600.0
"""How long a process may take to start, or to show a sign of life where no lock is seen."""
_HANDOVER_S = 5.0
_TELL_EVERY_S = 60.0
_LOOK_EVERY_S = 0.05


@dataclass
class Share:
    """A process's part in a stage: is there anything left to do, and (rank 0) whom has it seen?"""

    unfinished: bool
    seen: set[int] = field(default_factory=set)


@contextmanager
def holding(path: Path, work: Path, world: int) -> Iterator[Share]:
    """Hold this process's lock in the scratch folder while it works on its share.

    A process of the same rank that an earlier run left behind is waited for: it does our work.
    Rank 0 holds the output's claim already; it looks out for the others instead.
    """
    if rank() == 0:
        share = Share(True)
        threading.Thread(target=_look_out, args=(work, world, share.seen), daemon=True).start()
        yield share
        return
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_of(work, rank()))
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout as error:
        raise DataError(
            f"another process of rank {rank()} has been writing to {work} for {PATIENCE_S:.0f} s;"
            " wait until it ends, then run the same command again"
        ) from error
    try:
        yield Share(not (path / MANIFEST).exists())
    finally:
        lock.release()
        # Rank 0 may have finished and cleared up; then the lock or a journal brought it back.
        if (path / MANIFEST).exists():
            shutil.rmtree(work, ignore_errors=True)


def _look_out(work: Path, world: int, seen: set[int]) -> None:
    """Note who holds a lock, until all have: one that was there and is gone is dead, not late."""
    while (unseen := set(range(1, world)) - seen) and work.is_dir():
        seen |= {number for number in unseen if _is_held(work, number)}
        time.sleep(_LOOK_EVERY_S)


def wait(
    work: Path,
    missing: Callable[[], Mapping[int, int]],
    begun: float,
    seen: set[int],
    patience_s: float = PATIENCE_S,
) -> None:
    """Wait, on rank 0, until no rank's share is missing.

    `missing()`: rank -> how many units of its share no journal has. `begun`: when this process
    began (time.monotonic). `seen`: who held a lock since. Raises EngineError naming a rank that
    owes units and is dead, or gave no sign of life for `patience_s`.
    """
    owing = dict(missing())
    signs = dict.fromkeys(owing, begun)
    pause, told = 0.05, time.monotonic()
    while owing:
        # Locks before journals: who lets go in between has written all that it will.
        held = {number for number in owing if _is_held(work, number)}
        before, owing = owing, dict(missing())
        now = time.monotonic()
        for number, units in owing.items():
            if number in held or units < before[number]:
                signs[number] = now
            limit = _HANDOVER_S if number in seen else patience_s
            if number not in held and now - signs[number] > min(limit, patience_s):
                raise EngineError(_dead(number, units))
        seen |= held
        if owing and now - told > _TELL_EVERY_S:
            told = now
            units = sum(owing.values())
            print(f"{units} units to go; waiting for {_named(sorted(owing))}", flush=True)
        time.sleep(pause if owing else 0)
        pause = min(2 * pause, 2.0)


def _lock_of(work: Path, number: int) -> Path:
    return work / f"lock-{number:05d}"


def _is_held(work: Path, number: int) -> bool:
    from filelock import FileLock, Timeout

    path = _lock_of(work, number)
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _dead(number: int, units: int) -> str:
    return (
        f"the process of rank {number} ended, or never began, and {units} units of its share are"
        " missing. What is finished is kept; run the same command again, on every rank:"
        f" {command_line()}"
    )
