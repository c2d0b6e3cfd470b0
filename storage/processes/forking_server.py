"""Runs calls of one program in turn, each in a fork of a process that has imported everything once.

A start of Python with torch, transformers and DeepSpeed takes seconds; a fork takes milliseconds, and is as separate
as a process of its own: environment, folder, output, memory, exit code. The parent holds a `ForkingServer`; the
server is a program that imports, and then calls `serve`. POSIX only.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from storage.processes.child_process import POLL_S, end_descendants, make_supervised_command, stop_child
from storage.processes.supervisor import die_with_parent


class ForkingServer:
    """The parent's end of a server. It and all its forks end when this process is gone."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], grace_s: float, errors: IO[bytes]) -> None:
        """Starts the server `argv`, whose own stderr goes to `errors`. `grace_s`: see `run_child`."""
        self._grace_s = grace_s
        self._process = subprocess.Popen(
            make_supervised_command(argv, grace_s=grace_s),
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def run(self, arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, output: Path) -> int | None:
        """Runs one call and returns its exit code, negative if a signal ended it; None if the server has ended.

        stdout and stderr are appended to the file `output`. If an exception interrupts the wait, the server and the
        call end as a command of `run_child` does.
        """
        request = {"arguments": list(arguments), "env": dict(env), "cwd": cwd and str(cwd), "output": str(output)}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return self._read_code()
        except BrokenPipeError:
            return None
        except BaseException:
            stop_child(self._process, grace_s=self._grace_s)
            raise

    def close(self) -> None:
        """Ends the server, which runs nothing."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        self._process.terminate()
        self._process.wait()

    def _read_code(self) -> int | None:
        answers = self._process.stdout
        assert answers is not None
        while True:
            readable, _, _ = select.select([answers], [], [], POLL_S)  # Ray's cancel does not end a wait
            if readable:
                line = answers.readline()
                return int(line) if line else None


def serve(call: Callable[[Sequence[str]], int], *, prepare: Callable[[], None]) -> int:
    """Calls `prepare`; then runs `call(arguments)` in a fork for each request of stdin, and answers its exit code.

    Ends with stdin. SIGTERM and SIGINT are passed on to the fork; the server then ends after it, with 128 + the
    signal's number. What `prepare` writes to stdout goes to stderr, what `call` writes to the request's file.
    """
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    prepare()
    running: list[int] = []
    stopped: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopped.append(number)
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if not running:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for line in sys.stdin.buffer:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # until the fork's id is known
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _run_call(call, json.loads(line))
        running.append(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        _, status = os.waitpid(pid, 0)
        running.remove(pid)
        if stopped:
            return 128 + stopped[0]
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
    return 0


def _run_call(call: Callable[[Sequence[str]], int], request: dict[str, Any]) -> NoReturn:
    """Becomes the process of one call."""
    code = 1
    try:
        die_with_parent()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        _redirect(request["output"])
        os.environ.clear()
        os.environ.update(request["env"])
        if request["cwd"]:
            os.chdir(request["cwd"])
        code = call(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
            end_descendants()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _redirect(output: str) -> None:
    """Makes stdin empty, and appends stdout and stderr to a file."""
    log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
