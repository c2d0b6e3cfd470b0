"""Commands as Ray tasks: programs that run wherever the cluster has room."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayError

from storage.errors import StillhouseError
from teacher_dump.ray_jobs.cluster import cluster, gpus_or_default, last_line

_NOT_STARTED = 127  # as shells have it
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


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
    with cluster(address, local_cpus=math.ceil(num_cpus)):
        gpus = gpus_or_default(num_gpus, 1)
        task = ray.remote(num_cpus=num_cpus, num_gpus=gpus, max_retries=0)(_run_command)
        waiting = [task.remote(command, str(Path.cwd())) for command in commands]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(done[0])
            except RayError as error:
                raise StillhouseError(f"a command's worker failed; see {logs}: {last_line(error)}") from error


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
