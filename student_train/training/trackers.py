"""Metrics for people to watch: TensorBoard, Weights & Biases, MLflow. metrics.jsonl holds the same, and is the record.

A resumed run goes on in the same curves, no step twice: TensorBoard's files are written again from metrics.jsonl;
the other two go on in the run that tracking.json names, after the last step that they were given. (A resumed run
repeats the steps since its last saved state to the bit, so those that are left out are there already.)
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
_EVENT_THREAD = "_AsyncWriterThread"  # TensorBoard's, which prints a traceback and lets go
_Values = Mapping[str, float]


def check_trackers(names: Sequence[Tracker]) -> None:
    """ConfigError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"track: {name} is not installed; pip install {name}, or leave it out of stages.NAME.track"
            )


@dataclass(frozen=True)
class _Sink:
    run: str | None  # its id at the service
    write: Callable[[int, _Values], object]
    close: Callable[[bool], object]  # takes whether the run failed


class Tracking:
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
        """`title`: of the run. `settings`: of the stage. `done`: the logged steps of a run that is resumed."""
        self._path = output / _FILE
        self._known: dict[str, Any] = _read(self._path) if done else {}
        self._sinks: dict[str, _Sink] = {}
        for name in names:
            if name == "tensorboard":
                self._sinks[name] = _tensorboard(output / name, done)
            else:
                known = self._known.get(name, {})
                self._sinks[name] = _SERVICES[name](output, title, settings, known.get("run"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks.values():
            sink.close(kind is not None)

    def write(self, values: Mapping[str, Any]) -> None:
        """Numbers of a logged step, `step` among them; what is no number is left out."""
        step, numbers = int(values["step"]), _numbers(values)
        for name, sink in self._sinks.items():
            if sink.run is None:
                sink.write(step, numbers)
            elif step > self._known.get(name, {}).get("step", 0):
                sink.write(step, numbers)
                self._known[name] = {"run": sink.run, "step": step}
                write_json(self._path, self._known)


def _tensorboard(folder: Path, done: Sequence[Mapping[str, Any]]) -> _Sink:
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
            if not failed:  # else what has failed is told, not what it did to the last events
                raise
        finally:
            threading.excepthook = before

    for values in done:
        write(int(values["step"]), _numbers(values))
    return _Sink(None, write, close)


def _report_thread(report: Callable[[Any], object], failure: Any) -> None:
    """Threads' failures as before, but for a full disk in TensorBoard's own: the next event that is given tells it."""
    if type(failure.thread).__name__ != _EVENT_THREAD or failure.exc_value is None or not is_full(failure.exc_value):
        report(failure)


def _wandb(output: Path, title: str, settings: Mapping[str, Any], run: str | None) -> _Sink:
    found = importlib.import_module("wandb").init(
        project=_PROJECT, name=title, config=dict(settings), dir=str(output), id=run, resume="allow"
    )
    return _Sink(
        found.id,
        lambda step, values: found.log(dict(values), step=step),
        lambda failed: found.finish(exit_code=int(failed)),
    )


def _mlflow(_output: Path, title: str, settings: Mapping[str, Any], run: str | None) -> _Sink:
    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient()
    if run is None:
        experiment = mlflow.set_experiment(_PROJECT).experiment_id
        run = str(client.create_run(experiment, run_name=title).info.run_id)
        for name, value in settings.items():
            client.log_param(run, name, json.dumps(value)[:6000])  # it takes no longer ones
    else:
        client.update_run(run, status="RUNNING")

    def write(step: int, values: _Values) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    return _Sink(run, write, lambda failed: client.set_terminated(run, "FAILED" if failed else "FINISHED"))


_SERVICES = {"wandb": _wandb, "mlflow": _mlflow}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "step" and isinstance(value, int | float)}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
