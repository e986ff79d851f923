"""Metrics of a run: a JSON line for each update, always; wandb and its kin when asked."""

import json
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.claims import rank
from pipeline.config import identity
from pipeline.errors import DataError

TRACKERS = ("none", "wandb", "tensorboard", "trackio")
PROJECT = "turnwise"


def check_tracker(name: str) -> None:
    """Raise DataError where the tracker is unknown, its library missing, or wandb without a key.

    accelerate only logs that it leaves a missing one out; wandb would stop when training begins.
    """
    if name not in TRACKERS:
        raise DataError(f"--trackers {name!r}: choose one of {', '.join(TRACKERS)}")
    if name != "none" and find_spec(name) is None:
        raise DataError(f"{name} is missing. Install it with `pip install 'turnwise[track]'`")
    if name == "wandb" and rank() == 0:
        import wandb

        try:
            wandb.login()  # asks for nothing where WANDB_MODE is offline or disabled
        except wandb.Error as error:
            raise DataError(f"{error} Or keep the curves here: WANDB_MODE=offline") from error


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names: TensorBoard takes numbers and text only."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


class Metrics:
    """Writes metrics.jsonl on rank 0 and hands the same values to accelerate's trackers."""

    def __init__(self, accelerator: Any, work: Path, config: Any, done: int) -> None:
        """Append to the metrics.jsonl of `work` if updates were `done` before, else start it anew.

        `config` is a trainer's; trackers show it beside the curves.
        """
        self.accelerator = accelerator
        self.path = work / "metrics.jsonl"
        if accelerator.is_main_process and done == 0:
            self.path.write_text("")
        if accelerator.log_with:
            run = run_id(work, config.resume) if accelerator.is_main_process else ""
            # TensorBoard would show the settings of a resumed run as those of another one.
            settings = flat(identity(config)) if done == 0 else None
            each = tracker_settings(Path(accelerator.project_dir), run)
            accelerator.init_trackers(PROJECT, config=settings, init_kwargs=each)
            if done and accelerator.is_main_process:
                self.tell_again()

    def tell_again(self) -> None:
        """Give trackers the lines that are there: a kill took what they hadn't written yet."""
        for line in self.path.read_text().splitlines():
            values = json.loads(line)
            self.accelerator.log(values, step=values.pop("update"))

    def log(self, update: int, values: dict[str, float]) -> None:
        """Append one line; flushed, so that it can be followed while the run goes on."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as lines:
                lines.write(json.dumps({"update": update, **values}) + "\n")
        self.accelerator.log(values, step=update)


def run_id(work: Path, resume: str) -> str:
    """Return the id under which trackers know this run: kept in the work folder, new for `never`.

    It names a run on a server and decides nothing, so it needs no seed.
    """
    path = work / "tracker_run"
    if resume == "never" or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()


def tracker_settings(curves: Path, run: str) -> dict[str, dict[str, Any]]:
    """Return what each tracker needs to go on with the same run."""
    name = f"{curves.stem}-{run}"
    return {
        "wandb": {"id": run, "name": name, "resume": "allow", "dir": str(curves)},
        "trackio": {"name": name, "resume": "allow"},
        "tensorboard": {"purge_step": 0},  # what an earlier start wrote is told again
    }
