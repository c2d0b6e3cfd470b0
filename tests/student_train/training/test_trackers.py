"""Trackers continue a resumed run's curves; a tracker that is not installed is refused by name.

Weights & Biases and MLflow are not installed for tests: small stand-ins take what is sent to the narrow part of
their interfaces that is used. Both were tried by hand as they are (LOG.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.errors import ConfigError
from student_train.config import Tracker
from student_train.training.trackers import Trackers, check_trackers


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "grad_norm": None}


def track(names: tuple[Tracker, ...], output: Path, steps: range, *, done: int = 0) -> None:
    kept = [line(step) for step in range(1, done + 1)]
    with Trackers(names, output, title="kd-0", settings={"lr": 1e-3}, done=kept) as tracking:
        for step in steps:
            tracking.write(line(step))


class Wandb:
    """A fake of the service: keeps the points of each run."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict]]] = {}
        self.exit_codes: list[int] = []

    def init(self, *, id: str | None, resume: str, **_: object) -> Any:  # noqa: A002
        run = id or f"run{len(self.runs)}"
        assert resume == "allow"
        points = self.runs.setdefault(run, [])
        return SimpleNamespace(
            id=run,
            log=lambda values, *, step: points.append((step, values)),
            finish=lambda *, exit_code: self.exit_codes.append(exit_code),
        )


class Mlflow:
    """A fake of the service: keeps the points and the status of each run."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[str, float, int]]] = {}
        self.status: dict[str, str] = {}
        self.params: dict[str, str] = {}

    def MlflowClient(self) -> Any:
        return self

    def set_experiment(self, _name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def create_run(self, _experiment: str, *, run_name: str) -> Any:
        self.points[run_name] = []
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def update_run(self, run: str, *, status: str) -> None:
        self.status[run] = status

    def log_param(self, _run: str, name: str, value: str) -> None:
        self.params[name] = value

    def log_metric(self, run: str, name: str, value: float, *, step: int) -> None:
        self.points[run].append((name, value, step))

    def set_terminated(self, run: str, status: str) -> None:
        self.status[run] = status


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    track(("tensorboard",), tmp_path, range(1, 6))
    track(("tensorboard",), tmp_path, range(4, 9), done=3)  # killed after 5, its last state was of 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 9)
    ]


def test_services_continue_the_run_and_get_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Wandb(), Mlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    track(("wandb", "mlflow"), tmp_path, range(1, 6))
    track(("wandb", "mlflow"), tmp_path, range(4, 9), done=3)
    assert wandb.runs == {"run0": [(step, {"loss": 1 / step}) for step in range(1, 9)]}
    assert mlflow.points == {"kd-0": [("loss", 1 / step, step) for step in range(1, 9)]}
    assert mlflow.params == {"lr": "0.001"}
    assert mlflow.status == {"kd-0": "FINISHED"}
    track(("wandb",), tmp_path, range(1, 3))  # a run from the start is another one
    assert wandb.runs["run1"] == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"wandb": {"run": "run1", "step": 2}}


def test_a_failed_run_is_marked_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, mlflow = Wandb(), Mlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tracking = Trackers(("wandb", "mlflow"), tmp_path, title="kd-0", settings={})
    with pytest.raises(RuntimeError, match="out of memory"), tracking:
        raise RuntimeError("out of memory")
    assert wandb.exit_codes == [1]
    assert mlflow.status == {"kd-0": "FAILED"}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: Tracker) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as Python does for what cannot be imported
    with pytest.raises(ConfigError, match=rf"{name} is not installed; pip install {name}, or remove it"):
        check_trackers((name,))


def test_tensorboard_is_a_dependency_of_the_student() -> None:
    check_trackers(("tensorboard",))
