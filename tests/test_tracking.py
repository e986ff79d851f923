"""metrics.jsonl is always written; a tracker that isn't there is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.tracking import Metrics, check_tracker, flat
from tests import trainables


class Recorder:
    """Stands for an Accelerator with one tracker."""

    def __init__(self, main: bool) -> None:
        self.is_main_process = main
        self.log_with = ["recorder"]
        self.seen: list[Any] = []

    def init_trackers(self, project: str, config: dict[str, Any]) -> None:
        self.seen.append((project, config))

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append((step, values))


def test_rank_0_writes_lines_and_trackers_get_the_same_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier start\n")
    first, second = Recorder(main=True), Recorder(main=False)

    for accelerator in (first, second):
        log = Metrics(accelerator, path, "turnwise", trainables.Made(rows=3, seed=1))
        log.log(1, {"loss": 0.5})
        log.log(2, {"loss": 0.25})

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"update": 1, "loss": 0.5}, {"update": 2, "loss": 0.25}]
    expected = [("turnwise", {"rows": 3, "seed": 1}), (1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert first.seen == second.seen == expected


def test_settings_are_flattened_with_dots() -> None:
    assert flat({"lr": 1.0, "task": {"a": {"b": 2}}}) == {"lr": 1.0, "task.a.b": 2}


def test_a_missing_or_unknown_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    with pytest.raises(DataError, match="choose one of none, wandb, tensorboard, trackio"):
        check_tracker("mlflow")
    monkeypatch.setattr("pipeline.tracking.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'turnwise\[track\]'"):
        check_tracker("wandb")
