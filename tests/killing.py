"""Kill generate again and again: `python killing.py LIVES FLAGS...`.

The imports happen once, then each run is a fork: a kill costs a fraction of a second. LIVES is a
JSON object, output folder -> moments, one moment a run. {"lines": n} kills when the journal has n
lines more than before, {"after_s": s} after so long, {"call": n} at the n-th call that moves,
forces or deletes a file. A run that ends before its moment is reported. The last run of each life
is left alone.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - imported before the forks

import pipeline.engines.hf  # noqa: F401
from pipeline.config import parse
from pipeline.journal import read_journal
from stages import generate


def warm_up() -> None:
    """Play one game here, so that no run has to import anything."""
    flags = ["--environment", "guessing_game", "--dataset", "guessing_game", "--num_data", "1"]
    flags += ["--engine", "scripted", "--script", "guessing_game"]
    model = sys.argv[sys.argv.index("--model") + 1]
    with TemporaryDirectory() as out:
        generate.main(parse(generate.Config, [*flags, "--model", model, "--output_repo", out]))


def live(out: str, moments: list[dict[str, float]], jitter: random.Random) -> None:
    """Run and kill, once a moment, then run to the end; print what became of each run."""
    journal = Path(out, ".turnwise", "journal.jsonl")
    for moment in [*moments, {}]:
        before = list(read_journal(journal)) if journal.exists() else []
        child = os.fork()
        if child == 0:
            _play(out, moment)
        ended = _wait(child, journal, moment, len(before), jitter)
        after = list(read_journal(journal)) if journal.exists() else None
        if after is not None:
            assert after[: len(before)] == before, "a record changed"
            keys = [(row["prompt_id"], row["sample"]) for row in after]
            assert len(keys) == len(set(keys)), "a finished dialogue was played again"
        print(json.dumps({"ended": ended, "out": out}), flush=True)
        assert moment or ended == 0, ended


def _play(out: str, moment: dict[str, float]) -> None:
    """Be the stage."""
    sys.argv += ["--output_repo", out]
    if "call" in moment:
        for name in ("replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, _deadly(getattr(os, name), int(moment["call"])))
    generate.main(parse(generate.Config))
    sys.stdout.flush()
    os._exit(0)


_CALLS = 0


def _deadly(call: Callable[..., Any], fatal: int) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _CALLS
        _CALLS += 1
        if fatal == _CALLS:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def _wait(
    child: int, journal: Path, moment: dict[str, float], lines: int, jitter: random.Random
) -> int:
    """Kill the child at its moment; return its exit code, -9 where it was killed."""
    began = time.monotonic()
    while "lines" in moment or "after_s" in moment:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        grown = journal.read_bytes().count(b"\n") - lines if journal.exists() else 0
        if grown >= moment.get("lines", 1e9) or time.monotonic() - began > moment.get(
            "after_s", 99
        ):
            time.sleep(jitter.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    lives, *flags = sys.argv[1:]
    sys.argv = ["stages/generate.py", *flags]
    torch.set_num_threads(1)
    warm_up()
    for out, moments in json.loads(lives).items():
        live(out, moments, random.Random(7))
