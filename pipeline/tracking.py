"""Metrics of a run: a JSON line for each update, always; wandb and its kin when asked."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import identity
from pipeline.errors import DataError

TRACKERS = ("none", "wandb", "tensorboard", "trackio")


def check_tracker(name: str) -> None:
    """Raise DataError where the tracker is unknown or its library is not installed.

    accelerate only logs that it leaves a missing one out.
    """
    if name not in TRACKERS:
        raise DataError(f"--trackers {name!r}: choose one of {', '.join(TRACKERS)}")
    if name != "none" and find_spec(name) is None:
        raise DataError(f"{name} is missing. Install it with `pip install 'turnwise[track]'`")


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

    def __init__(self, accelerator: Any, path: Path, project: str, config: Any) -> None:
        """Start an empty `path`; `config` is what trackers show beside the curves."""
        self.accelerator = accelerator
        self.path = path
        if accelerator.is_main_process:
            path.write_text("")
        if accelerator.log_with:
            accelerator.init_trackers(project, config=flat(identity(config)))

    def log(self, update: int, values: dict[str, float]) -> None:
        """Append one line; flushed, so that it can be followed while the run goes on."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as lines:
                lines.write(json.dumps({"update": update, **values}) + "\n")
        self.accelerator.log(values, step=update)
