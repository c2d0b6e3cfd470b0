"""Ray: an actor pool over the parts of a plan, and commands as tasks. Only file that imports ray.

Works with a Ray that this process starts, with a running cluster (`RAY_ADDRESS`, `dump.ray_address`), and
inside a submitted job.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError

from storage.errors import ConfigError, StillhouseError
from teacher_dump.log_file import send_output_to
from teacher_dump.plan import Part
from teacher_dump.scoring import PartScorer
from teacher_dump.worker import PartOutcome, Worker, WorkerSettings, open_scorer

_OBJECT_STORE_BYTES = 256 * 2**20  # of a local Ray; parts travel as text and results as a few numbers
_NUM_RESTARTS = 5  # of an actor: an accident may repeat, a part that always kills its worker must not loop
_NOT_STARTED = 127  # as shells have it
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


A = TypeVar("A")
B = TypeVar("B")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """What one actor or command asks Ray for."""

    num_cpus: float = 1
    num_gpus: float = 0  # without any, Ray hides all GPUs from it


@dataclass(frozen=True)
class Command:
    """A program to run somewhere in the cluster."""

    name: str
    argv: tuple[str, ...]
    log_path: Path  # stdout and stderr, appended
    env: Mapping[str, str] = field(default_factory=dict)  # added to the worker's


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    name: str
    returncode: int  # negative: killed by that signal; 127: could not be started
    seconds: float
    log_path: Path


def gpus_or_default(wanted: float | None, default: float) -> float:
    """What is wanted; where nothing is said, `default` in a cluster that has GPUs and 0 in one that has none."""
    if wanted is not None:
        return wanted
    return default if ray.cluster_resources().get("GPU", 0) else 0


def score_parts(
    parts: Sequence[Part],
    settings: WorkerSettings,
    *,
    num_actors: int,
    num_cpus: float,
    num_gpus: float | None,
    address: str | None,
    logs: Path,
    notify: Callable[[str], None],
) -> Iterator[PartOutcome]:
    """Score and commit parts in a pool of actors, each with a teacher of its own; outcomes as they come.

    A killed actor is started again, a few times, and its parts are repeated; its commits stand.
    `num_cpus` and `num_gpus` are each actor's; num_gpus None: the engine's tensor_parallel_size where Ray has GPUs.
    `notify` is told once if the cluster has no room yet, since an autoscaler may still make it.
    StillhouseError: what a worker says of its teacher, or a worker that fails in a way nobody foresaw.
    """
    num_actors = min(num_actors, len(parts))
    local_cpus = math.ceil(num_actors * num_cpus) + 1  # one for Ray Data itself
    with _cluster(address, local_cpus=local_cpus):
        gpus = gpus_or_default(num_gpus, settings.engine_settings.get("tensor_parallel_size", 1))
        resources = Resources(num_cpus, gpus)
        _compare_room(num_actors, resources, notify)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items([{"part": part.to_text()} for part in parts], override_num_blocks=len(parts))
        outcomes = rows.map_batches(
            _PartActor,
            fn_constructor_kwargs={"settings": settings, "logs": logs.resolve()},
            batch_size=1,
            batch_format="numpy",
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            max_restarts=_NUM_RESTARTS,
            max_task_retries=_NUM_RESTARTS,
        )
        try:
            for row in outcomes.iter_rows():
                yield _outcome(row)
        except RayError as error:
            raise StillhouseError(f"a dump worker failed; see {logs}: {_last_line(error)}") from error


def with_teacher(
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
    Resources as in `score_parts`. StillhouseError (or ConfigError): what the function or the teacher raised,
    or an actor that died.
    """
    with _cluster(address, local_cpus=math.ceil(num_cpus)):
        gpus = gpus_or_default(num_gpus, settings.engine_settings.get("tensor_parallel_size", 1))
        kind: Any = ray.remote(num_cpus=num_cpus, num_gpus=gpus)(_TeacherActor)  # Ray's types know no methods
        actor = kind.remote(settings, logs.resolve())
        try:
            said: _Said = ray.get(actor.call.remote(function, argument))
        except RayError as error:
            raise StillhouseError(f"the teacher's process failed; see {logs}: {_last_line(error)}") from error
        finally:
            ray.kill(actor)
    said.raise_failure()
    return said.result


def run_commands(
    commands: Sequence[Command],
    num_cpus: float,
    num_gpus: float | None,
    *,
    address: str | None = None,
    logs: Path | None = None,
) -> Iterator[CommandResult]:
    """Run commands as Ray tasks, as many at once as the cluster has room for; results as they end.

    Each asks for `num_cpus` and `num_gpus` (None: one where Ray has any) and runs in this process's current
    folder. A command dies with its worker. `logs` is where Ray's own output goes; default: beside the first
    command's log.
    """
    if not commands:
        return
    logs = logs or commands[0].log_path.parent
    with _cluster(address, local_cpus=math.ceil(num_cpus)):
        gpus = gpus_or_default(num_gpus, 1)
        task = ray.remote(num_cpus=num_cpus, num_gpus=gpus, max_retries=0)(_run_command)
        waiting = [task.remote(command, str(Path.cwd())) for command in commands]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(done[0])
            except RayError as error:
                raise StillhouseError(f"a command's worker failed; see {logs}: {_last_line(error)}") from error


@dataclass(frozen=True)
class _Said:
    """What an actor answers. Failures are answers too, so that Ray's own text does not hide them."""

    result: Any = None
    failure: str = ""
    is_config: bool = False

    @staticmethod
    def of(error: Exception, log: Path) -> _Said:
        """A failure, told in one line; the traceback of one that nobody foresaw goes to the log."""
        if isinstance(error, StillhouseError):
            return _Said(failure=str(error), is_config=isinstance(error, ConfigError))
        _log.error("the worker failed in a way that nobody foresaw", exc_info=error)
        return _Said(failure=f"a dump worker failed: {type(error).__name__}: {error}; the traceback is in {log}")

    def raise_failure(self) -> None:
        if self.failure:
            raise (ConfigError if self.is_config else StillhouseError)(self.failure)


class _TeacherActor:
    """A teacher that is opened for one call."""

    def __init__(self, settings: WorkerSettings, logs: Path) -> None:
        self._settings = settings
        self._log_path = _log_to_file(logs)

    def call(self, function: Callable[[PartScorer, Any], Any], argument: Any) -> _Said:
        try:
            return _Said(function(open_scorer(self._settings), argument))
        except Exception as error:
            return _Said.of(error, self._log_path)


def _log_to_file(logs: Path) -> Path:
    """Send what this process prints and logs to a file of its own; its path."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    path = logs / f"teacher-{socket.gethostname()}-{os.getpid()}.log"
    send_output_to(path)
    return path


class _PartActor:
    """A Worker as Ray Data calls it."""

    def __init__(self, *, settings: WorkerSettings, logs: Path) -> None:
        self._log_path = _log_to_file(logs)
        self._settings = settings
        self._worker: Worker | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        (text,) = batch["part"]
        row: dict[str, Any] = {"failure": "", "is_config": False}
        try:
            if self._worker is None:
                self._worker = Worker(self._settings)
            row |= asdict(self._worker.run(Part.from_text(str(text))))
        except Exception as error:
            said = _Said.of(error, self._log_path)
            row = {"failure": said.failure, "is_config": said.is_config}
            row |= asdict(PartOutcome(-1, 0, 0, 0, 0.0, 0.0))
        return {name: np.array([value]) for name, value in row.items()}


def _outcome(row: Mapping[str, Any]) -> PartOutcome:
    _Said(failure=row["failure"], is_config=row["is_config"]).raise_failure()
    names = PartOutcome.__dataclass_fields__
    return PartOutcome(**{name: row[name] for name in names})


def _run_command(command: Command, folder: str) -> CommandResult:
    started = time.monotonic()
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    with command.log_path.open("ab") as log:
        try:
            process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **command.env},
                cwd=folder if Path(folder).is_dir() else None,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            log.write(f"{command.argv[0]} cannot be started: {error}\n".encode())
            return CommandResult(command.name, _NOT_STARTED, time.monotonic() - started, command.log_path)
        returncode = process.wait()
    return CommandResult(command.name, returncode, time.monotonic() - started, command.log_path)


def _die_with_parent() -> None:
    """Of the worker: a killed dump or ablation must not leave its commands running. Linux only."""
    if os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@contextmanager
def _cluster(address: str | None, *, local_cpus: int) -> Iterator[None]:
    """A connection to Ray: the one that there is, a running cluster's, or a local Ray for as long as needed."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, local_cpus),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RayError, OSError) as error:
        raise StillhouseError(f"Ray cannot be had at {address or 'this machine'}: {_last_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _compare_room(num_actors: int, resources: Resources, notify: Callable[[str], None]) -> None:
    room = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        if room.get(kind, 0) < num_actors * wanted:
            notify(
                f"Ray has {room.get(kind, 0):g} {kind}s and the {num_actors} actors want {num_actors * wanted:g}; "
                "those that find no room wait for the cluster to grow"
            )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
