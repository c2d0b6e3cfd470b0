"""Runs commands as Ray tasks: programs that run wherever the cluster has room."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import ray
from ray.exceptions import RayError

from storage.errors import StillhouseError
from storage.processes.child_process import GRACE_S, run_child
from storage.processes.forking_server import ForkingServer
from storage.processes.waiting import Waiting
from teacher_dump.ray_jobs.cluster import (
    Resources,
    check_room,
    connect_to_ray,
    describe_lacking_room,
    get_last_line,
    resolve_num_gpus,
)

_GPUS_OF_COMMANDS = "ablations.gpus_per_run or dump.gpus_per_actor"
_SERVER_ENDED = 127  # as for a program that could not be started
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A program to run somewhere in the cluster."""

    name: str
    argv: tuple[str, ...]
    log_path: Path  # stdout and stderr, appended
    env: Mapping[str, str] = field(default_factory=dict)  # added to the worker's
    grace_s: float = GRACE_S  # between SIGTERM and SIGKILL; math.inf: it saves its state and ends by itself
    num_devices: int = 1  # how many GPUs it uses, if Ray has any
    server: tuple[str, ...] = ()  # argv of a forking server that runs `argv` as a call without GPUs; (): none
    arguments: tuple[str, ...] = ()  # of that call


@dataclass(frozen=True)
class CommandResult:
    """The exit code and time of a command."""

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
    """Runs commands as Ray tasks, as many at once as the cluster has room for; yields results as they end.

    Each requests `num_cpus` and `num_gpus` (None: its `num_devices`, if Ray has GPUs) and runs in this process's
    current folder. A command dies with its worker. When the generator is interrupted or closed, waiting commands are
    dropped and running ones get SIGTERM; it returns after they have ended. `logs` is the folder of Ray's own output;
    by default that of the first command's log.
    """
    if not commands:
        return
    logs = logs or commands[0].log_path.parent
    with connect_to_ray(address, local_cpus=math.ceil(num_cpus)) as is_fixed:
        task = ray.remote(num_cpus=num_cpus, max_retries=0)(_run_command)
        gpus = [resolve_num_gpus(num_gpus, command.num_devices) for command in commands]
        most = Resources(num_cpus, max(gpus))
        if is_fixed:
            check_room(most, what="a process", field=_GPUS_OF_COMMANDS)
        room = WaitingCommands(commands, most)
        waiting = [
            task.options(num_gpus=own).remote(replace(command, server=()) if own else command, str(Path.cwd()))
            for command, own in zip(commands, gpus, strict=True)
        ]
        try:
            while waiting:
                with Waiting(room.describe):
                    done, waiting = ray.wait(waiting, num_returns=1)
                try:
                    result: CommandResult = ray.get(done[0])
                except RayError as error:
                    raise StillhouseError(f"a command's worker failed; see {logs}: {get_last_line(error)}") from error
                yield result
        finally:
            _cancel(waiting)


def _cancel(tasks: list[ray.ObjectRef]) -> None:
    """Interrupts tasks and waits while their commands save state. Without force, which would kill the worker."""
    if not tasks:
        return
    for task in tasks:
        ray.cancel(task, force=False)
    _log.warning("waiting until the commands that run have saved their states; a second signal ends them at once")
    ray.wait(tasks, num_returns=len(tasks))


class WaitingCommands:
    """Describes the commands that wait for room: those whose log has not changed."""

    def __init__(self, commands: Sequence[Command], resources: Resources) -> None:
        self._logs = {command.log_path: _read_log_state(command.log_path) for command in commands}
        self._resources = resources

    def describe(self) -> str:
        """Returns what the commands wait for; "" while a command runs."""
        num_waiting = sum(_read_log_state(path) == state for path, state in self._logs.items())
        if num_waiting < len(self._logs):
            return ""
        asked = f"{self._resources.num_cpus:g} CPUs and {self._resources.num_gpus:g} GPUs"
        lacks = describe_lacking_room(self._resources)
        why = f"asks for {lacks}; Ctrl-C ends the wait" if lacks else f"asks for {asked}"
        return f"Ray to find room for {num_waiting} commands, each of which {why}"


def _read_log_state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _run_command(command: Command, folder: str) -> CommandResult:
    started = time.monotonic()
    command.log_path.parent.mkdir(parents=True, exist_ok=True)
    env, cwd = {**os.environ, **command.env}, Path(folder) if Path(folder).is_dir() else None
    with command.log_path.open("ab") as log:
        if command.server:
            returncode = _call_server(command, env, cwd, log)
        else:
            returncode = run_child(command.argv, env=env, cwd=cwd, output=log, grace_s=command.grace_s)
    return CommandResult(command.name, returncode, time.monotonic() - started, command.log_path)


_servers: dict[tuple[str, ...], ForkingServer] = {}  # of this worker, which runs one task after another


def _call_server(command: Command, env: Mapping[str, str], cwd: Path | None, log: IO[bytes]) -> int:
    """Runs a command in a fork of the worker's server, which is started for the first one."""
    place = (*command.server, env.get("OMP_NUM_THREADS", ""))  # which is read when libraries are loaded
    for other in [each for each in _servers if each != place or not _servers[each].is_running]:
        _servers.pop(other).close()
    if place not in _servers:
        _servers[place] = ForkingServer(command.server, env=env, grace_s=command.grace_s, errors=log)
    try:
        code = _servers[place].run(command.arguments, env=env, cwd=cwd, output=command.log_path)
    except BaseException:
        del _servers[place]
        raise
    if code is None:
        _servers.pop(place).close()
    return _SERVER_ENDED if code is None else code
