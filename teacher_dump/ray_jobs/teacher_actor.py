"""A teacher in an actor of its own, opened for one call; and what all actors of a dump share: logs and answers."""

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
from teacher_dump.ray_jobs.cluster import GPUS_OF_ACTORS, cluster, lacking_room, last_line, refuse_without_room
from teacher_dump.ray_jobs.placement import Placement
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.workers.log_file import redirect_output
from teacher_dump.workers.worker import WorkerSettings, open_scorer

A = TypeVar("A")
B = TypeVar("B")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What an actor answers. Failures are answers too, so that Ray's own text does not hide them."""

    result: Any = None
    failure: str = ""
    is_config: bool = False

    @staticmethod
    def of(error: Exception, log: Path) -> Said:
        """A failure, told in one line; the traceback of one that nobody foresaw goes to the log."""
        if isinstance(error, StillhouseError):
            return Said(failure=str(error), is_config=isinstance(error, ConfigError))
        _log.error("the worker failed in a way that nobody foresaw", exc_info=error)
        return Said(failure=f"a dump worker failed: {type(error).__name__}: {error}; the traceback is in {log}")

    def raise_failure(self) -> None:
        """The failure, if it is one, as StillhouseError or ConfigError."""
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
    """`function(scorer, argument)`, called in one actor that has opened a teacher and ends with the call.

    `function` is one of a module, and what it takes and returns can be pickled; what is printed goes to the logs.
    Resources as in `PartPool`. StillhouseError (or ConfigError): what the function or the teacher raised,
    or an actor that died.
    """
    with cluster(address, local_cpus=math.ceil(num_cpus)) as is_fixed:
        placement = Placement.of(settings.engine_settings, num_cpus=num_cpus, num_gpus=num_gpus)
        if is_fixed:
            refuse_without_room(placement.resources, what="an actor", field=GPUS_OF_ACTORS)
        kind: Any = ray.remote(_TeacherActor)  # Ray's types know no methods
        try:
            actor = kind.options(**placement.actor_options(), **placement.group_options()).remote(
                settings, logs.resolve()
            )
            with Waiting(lambda: _subject(placement, logs)):
                said: Said = ray.get(actor.call.remote(function, argument))
            ray.kill(actor)
        except RayError as error:
            raise StillhouseError(f"the teacher's process failed; see {logs}: {last_line(error)}") from error
        finally:
            placement.remove_groups()
    said.raise_failure()
    return said.result


def _subject(placement: Placement, logs: Path) -> str:
    lacks = lacking_room(placement.resources, over_nodes=placement.makes_groups)
    if lacks:
        return f"Ray to place the teacher, which asks for {lacks}; Ctrl-C ends the wait"
    return f"the teacher's process; its log is in {logs}"


class _TeacherActor:
    """A teacher that is opened for one call."""

    def __init__(self, settings: WorkerSettings, logs: Path) -> None:
        self._settings = settings
        self._log_path = log_to_file(logs)

    def call(self, function: Callable[[PartScorer, Any], Any], argument: Any) -> Said:
        try:
            return Said(function(open_scorer(self._settings), argument))
        except Exception as error:
            return Said.of(error, self._log_path)


def log_to_file(logs: Path) -> Path:
    """Send what this process prints and logs to a file of its own; its path."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    path = logs / f"teacher-{socket.gethostname()}-{os.getpid()}.log"
    redirect_output(path)
    return path
