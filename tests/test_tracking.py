"""metrics.jsonl is always written; a tracker that isn't there is refused before any work."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline.errors import DataError
from pipeline.tracking import Metrics, check_tracker, flat


@dataclass(frozen=True)
class Config:
    """Stands for a trainer's."""

    rows: int = 3
    resume: str = "auto"


class Recorder:
    """Stands for an Accelerator with one tracker."""

    def __init__(self, main: bool) -> None:
        self.is_main_process = main
        self.log_with = ["recorder"]
        self.project_dir = "runs/it1.curves"
        self.began: dict[str, Any] = {}
        self.seen: list[Any] = []

    def init_trackers(self, project: str, **settings: Any) -> None:
        self.began = {"project": project, **settings}

    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append((step, values))


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def lines(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_rank_0_writes_lines_and_trackers_get_the_same_values(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an earlier start\n")
    first, second = Recorder(main=True), Recorder(main=False)

    for accelerator in (first, second):
        log = Metrics(accelerator, tmp_path, Config(), done=0)
        log.log(1, {"loss": 0.5})
        log.log(2, {"loss": 0.25})

    assert lines(tmp_path) == [{"update": 1, "loss": 0.5}, {"update": 2, "loss": 0.25}]
    assert first.seen == second.seen == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert first.began["project"] == "turnwise"
    assert first.began["config"] == {"rows": 3, "resume": "auto"}


def test_a_resumed_run_is_the_same_one_to_trackers_and_all_its_lines_are_told_again(
    tmp_path: Path,
) -> None:
    first, again = Recorder(main=True), Recorder(main=True)
    Metrics(first, tmp_path, Config(), done=0).log(1, {"loss": 0.5})

    Metrics(again, tmp_path, Config(), done=1).log(2, {"loss": 0.25})

    assert lines(tmp_path) == [{"update": 1, "loss": 0.5}, {"update": 2, "loss": 0.25}]
    assert again.seen == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]
    assert again.began["config"] is None
    run = (tmp_path / "tracker_run").read_text()
    for began in (first.began, again.began):
        wandb, trackio = began["init_kwargs"]["wandb"], began["init_kwargs"]["trackio"]
        assert (wandb["id"], wandb["resume"], wandb["dir"]) == (run, "allow", "runs/it1.curves")
        assert (trackio["name"], trackio["resume"]) == (f"it1-{run}", "allow")


def test_a_run_that_starts_over_is_another_one_to_trackers(tmp_path: Path) -> None:
    ids = []
    for resume in ("auto", "auto", "never"):
        accelerator = Recorder(main=True)
        Metrics(accelerator, tmp_path, Config(resume=resume), done=0)
        ids.append(accelerator.began["init_kwargs"]["wandb"]["id"])

    assert ids[0] == ids[1]
    assert ids[2] != ids[0]


def test_tensorboard_shows_one_curve_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done in (0, 2):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "curves")
        log = Metrics(accelerator, tmp_path, Config(), done)
        for update in range(done + 1, done + 5):
            log.log(update, {"loss": 1.0 / update, "lr": 0.5})
        accelerator.end_training()
        AcceleratorState._reset_state(True)
        if done == 0:  # the kill came after update 4, the checkpoint after update 2
            kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
            (tmp_path / "metrics.jsonl").write_text("".join(kept))

    curves = EventAccumulator(str(tmp_path / "curves" / "turnwise"))
    curves.Reload()
    assert curves.Tags()["scalars"] == ["loss", "lr"]
    points = [(event.step, event.value) for event in curves.Scalars("loss")]
    assert points == [(u, pytest.approx(1.0 / u)) for u in range(1, 7)]


def test_settings_are_flattened_with_dots() -> None:
    assert flat({"lr": 1.0, "task": {"a": {"b": 2}}}) == {"lr": 1.0, "task.a.b": 2}


def test_a_missing_or_unknown_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    with pytest.raises(DataError, match="choose one of none, wandb, tensorboard, trackio"):
        check_tracker("mlflow")
    monkeypatch.setattr("pipeline.tracking.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'turnwise\[track\]'"):
        check_tracker("wandb")
