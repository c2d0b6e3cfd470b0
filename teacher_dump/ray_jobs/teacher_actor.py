"""A teacher in an actor of its own, loaded for one call; and the log file and results of all actors."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from storage.errors import ConfigError, StillhouseError
from storage.processes.waiting import Waiting
from teacher_dump.ray_jobs.cluster import (
    GPUS_OF_ACTORS,
    check_room,
    connect_to_ray,
    describe_lacking_room,
    get_last_line,
)
from teacher_dump.ray_jobs.placement import Placement
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.workers.log_file import redirect_output
from teacher_dump.workers.worker import WorkerSettings, open_scorer

A = TypeVar("A")
B = TypeVar("B")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActorResult:
    """An actor's result. Failures are results, too, so that Ray's own text does not hide them."""

    result: Any = None
    failure: str = ""
    is_config: bool = False

    @staticmethod
    def from_error(error: Exception, log: Path) -> ActorResult:
        """Makes a failure from an error, in one line; logs the traceback of an unexpected error."""
        if isinstance(error, StillhouseError):
            return ActorResult(failure=str(error), is_config=isinstance(error, ConfigError))
        _log.error("the worker failed with an unexpected error", exc_info=error)
        return ActorResult(failure=f"a dump worker failed: {type(error).__name__}: {error}; the traceback is in {log}")

    def raise_failure(self) -> None:
        """Raises the failure, if it is one, as StillhouseError or ConfigError."""
        if self.failure:
            raise (ConfigError if self.is_config else StillhouseError)(self.failure)


def call_with_teacher(
    settings: WorkerSettings,
    function: Callable[[PartScorer, A], B],
    argument: A,
    *,
    num_cpus: float,
    num_gpus: float | None,
    address: str | None,
    logs: Path,
) -> B:
    """Calls `function(scorer, argument)` in one actor that loads a teacher and ends with the call.

    `function` is a module's function, and its argument and result can be pickled; its output goes to the logs.
    Resources as in `PartPool`. Raises StillhouseError (or ConfigError) for errors of the function or the teacher,
    and for an actor that died.
    """
    with connect_to_ray(address, local_cpus=math.ceil(num_cpus)) as is_fixed:
        placement = Placement.from_settings(settings.engine_settings, num_cpus=num_cpus, num_gpus=num_gpus)
        if is_fixed:
            check_room(placement.resources, what="an actor", field=GPUS_OF_ACTORS)
        kind: Any = ray.remote(_TeacherActor)  # Ray's types know no methods
        try:
            actor = kind.options(**placement.actor_options(), **placement.group_options()).remote(
                settings, logs.resolve()
            )
            with Waiting(lambda: _describe_wait(placement, logs)):
                outcome: ActorResult = ray.get(actor.call.remote(function, argument))
            ray.kill(actor)
        except RayError as error:
            raise StillhouseError(f"the teacher's process failed; see {logs}: {get_last_line(error)}") from error
        finally:
            placement.remove_groups()
    outcome.raise_failure()
    return outcome.result


def _describe_wait(placement: Placement, logs: Path) -> str:
    lacks = describe_lacking_room(placement.resources, over_nodes=placement.makes_groups)
    if lacks:
        return f"Ray to place the teacher, which asks for {lacks}; Ctrl-C ends the wait"
    return f"the teacher's process; its log is in {logs}"


class _TeacherActor:
    """Loads a teacher for one call."""

    def __init__(self, settings: WorkerSettings, logs: Path) -> None:
        self._settings = settings
        self._log_path = log_to_file(logs)

    def call(self, function: Callable[[PartScorer, Any], Any], argument: Any) -> ActorResult:
        try:
            return ActorResult(function(open_scorer(self._settings), argument))
        except Exception as error:
            return ActorResult.from_error(error, self._log_path)


def log_to_file(logs: Path) -> Path:
    """Redirects this process's output and log to a file of its own; returns its path."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    path = logs / f"teacher-{socket.gethostname()}-{os.getpid()}.log"
    redirect_output(path)
    return path
