"""Commands as Ray tasks: programs that run wherever the cluster has room."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayError

from storage.child_process import GRACE_S, run_child
from storage.errors import StillhouseError
from teacher_dump.ray_jobs.cluster import Resources, cluster, gpus_or_default, last_line, refuse_without_room

_GPUS_OF_COMMANDS = "ablations.gpus_per_run or dump.gpus_per_actor"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A program to run somewhere in the cluster."""

    name: str
    argv: tuple[str, ...]
    log_path: Path  # stdout and stderr, appended
    env: Mapping[str, str] = field(default_factory=dict)  # added to the worker's
    grace_s: float = GRACE_S  # between SIGTERM and SIGKILL; math.inf: it saves something and ends by itself


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    name: str
    returncode: int  # negative: killed by that signal; 127: could not be started
    seconds: float
    log_path: Path


def run_commands(
    commands: Sequence[Command],
    num_cpus: float,
    num_gpus: float | None,
    *,
    address: str | None = None,
    logs: Path | None = None,
) -> Generator[CommandResult, None, None]:
    """Run commands as Ray tasks, as many at once as the cluster has room for; results as they end.

    Each asks for `num_cpus` and `num_gpus` (None: one where Ray has any) and runs in this process's current
    folder. A command dies with its worker. When this is interrupted, or closed, commands that wait are forgotten and
    those that run get SIGTERM; it ends when they have. `logs` is where Ray's own output goes; default: beside the
    first command's log.
    """
    if not commands:
        return
    logs = logs or commands[0].log_path.parent
    with cluster(address, local_cpus=math.ceil(num_cpus)) as is_fixed:
        gpus = gpus_or_default(num_gpus, 1)
        if is_fixed:
            refuse_without_room(Resources(num_cpus, gpus), what="a process", field=_GPUS_OF_COMMANDS)
        task = ray.remote(num_cpus=num_cpus, num_gpus=gpus, max_retries=0)(_run_command)
        waiting = [task.remote(command, str(Path.cwd())) for command in commands]
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                try:
                    result: CommandResult = ray.get(done[0])
                except RayError as error:
                    raise StillhouseError(f"a command's worker failed; see {logs}: {last_line(error)}") from error
                yield result
        finally:
            _cancel(waiting)


def _cancel(tasks: list[ray.ObjectRef]) -> None:
    """Interrupt tasks and wait for them: what they run saves its state. Without force, which would kill the worker."""
    if not tasks:
        return
    for task in tasks:
        ray.cancel(task, force=False)
    _log.warning("waiting until the commands that run have saved their states; a second signal ends them at once")
    ray.wait(tasks, num_returns=len(tasks))


def _run_command(command: Command, folder: str) -> CommandResult:
    started = time.monotonic()
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    with command.log_path.open("ab") as log:
        returncode = run_child(
            command.argv,
            env={**os.environ, **command.env},
            cwd=Path(folder) if Path(folder).is_dir() else None,
            output=log,
            grace_s=command.grace_s,
        )
    return CommandResult(command.name, returncode, time.monotonic() - started, command.log_path)
