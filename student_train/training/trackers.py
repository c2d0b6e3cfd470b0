"""Writes metrics to TensorBoard, Weights & Biases or MLflow. metrics.jsonl holds the same and is authoritative.

A resumed run continues the same curves, without repeated steps: TensorBoard's files are written again from
metrics.jsonl; the other two continue the run that tracking.json names, after the last step that they received. (A
resumed run repeats the steps since its last saved state bit-exactly, so the skipped ones are already there.)
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from storage.backends.disk import explain_write_errors, is_full
from storage.backends.folder import write_json
from storage.errors import ConfigError, WriteError
from student_train.config import Tracker

_PROJECT = "stillhouse"
_FILE = "tracking.json"
_EVENT_THREAD = "_AsyncWriterThread"  # TensorBoard's, which prints a traceback and ends
_Values = Mapping[str, float]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Check that the trackers' packages are installed. Errors: ConfigError."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"track: {name} is not installed; pip install {name}, or remove it from stages.NAME.track"
            )


@dataclass(frozen=True)
class _Tracker:
    run: str | None  # the run's id at the service; None for local files
    write: Callable[[int, _Values], object]
    close: Callable[[bool], object]  # takes whether the run failed


class Trackers:
    """The trackers that a stage names. Use as a context manager."""

    def __init__(
        self,
        names: Sequence[Tracker],
        output: Path,
        *,
        title: str,
        settings: Mapping[str, Any],
        done: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`title`: of the run. `settings`: of the stage. `done`: logged steps of a resumed run."""
        self._path = output / _FILE
        self._known: dict[str, Any] = _read_tracking(self._path) if done else {}
        self._sinks: dict[str, _Tracker] = {}
        for name in names:
            if name == "tensorboard":
                self._sinks[name] = _open_tensorboard(output / name, done)
            else:
                known = self._known.get(name, {})
                self._sinks[name] = _SERVICES[name](output, title, settings, known.get("run"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks.values():
            sink.close(kind is not None)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the numbers of a logged step, which `values` holds as `step`; ignore values of other types."""
        step, numbers = int(values["step"]), _select_numbers(values)
        for name, sink in self._sinks.items():
            if sink.run is None:
                sink.write(step, numbers)
            elif step > self._known.get(name, {}).get("step", 0):
                sink.write(step, numbers)
                self._known[name] = {"run": sink.run, "step": step}
                write_json(self._path, self._known)


def _open_tensorboard(folder: Path, done: Sequence[Mapping[str, Any]]) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    before = threading.excepthook
    threading.excepthook = partial(_report_thread, before)
    with explain_write_errors(folder):
        events = SummaryWriter(str(folder), flush_secs=10)

    def write(step: int, values: _Values) -> None:
        with explain_write_errors(folder):
            for name, value in values.items():
                events.add_scalar(name, value, step)

    def close(failed: bool) -> None:
        try:
            with explain_write_errors(folder):
                events.close()
        except WriteError:
            if not failed:  # else the first failure is reported, not this one
                raise
        finally:
            threading.excepthook = before

    for values in done:
        write(int(values["step"]), _select_numbers(values))
    return _Tracker(None, write, close)


def _report_thread(report: Callable[[Any], object], failure: Any) -> None:
    """Report a thread's failure, except a full disk in TensorBoard's thread, which the next event reports."""
    if type(failure.thread).__name__ != _EVENT_THREAD or failure.exc_value is None or not is_full(failure.exc_value):
        report(failure)


def _open_wandb(output: Path, title: str, settings: Mapping[str, Any], run: str | None) -> _Tracker:
    found = importlib.import_module("wandb").init(
        project=_PROJECT, name=title, config=dict(settings), dir=str(output), id=run, resume="allow"
    )
    return _Tracker(
        found.id,
        lambda step, values: found.log(dict(values), step=step),
        lambda failed: found.finish(exit_code=int(failed)),
    )


def _open_mlflow(_output: Path, title: str, settings: Mapping[str, Any], run: str | None) -> _Tracker:
    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient()
    if run is None:
        experiment = mlflow.set_experiment(_PROJECT).experiment_id
        run = str(client.create_run(experiment, run_name=title).info.run_id)
        for name, value in settings.items():
            client.log_param(run, name, json.dumps(value)[:6000])  # MLflow's limit
    else:
        client.update_run(run, status="RUNNING")

    def write(step: int, values: _Values) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    return _Tracker(run, write, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED"))


_SERVICES = {"wandb": _open_wandb, "mlflow": _open_mlflow}


def _select_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "step" and isinstance(value, int | float)}


def _read_tracking(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
