"""Runs a command and ends all processes that the command started: `supervisor.py PARENT GRACE_S LAST_S ARGV…`.

It runs between one of our processes (PARENT, a process id) and a command, in a session of its own, so that
Ctrl-C in a terminal reaches PARENT only. As the command's *subreaper* (prctl(2)) it becomes the parent of
all orphaned descendants of the command, even those in other sessions. It needs only the standard library
and Linux, and is started with `python -I -S`, which takes 20 ms.

    SIGTERM or SIGINT     the command gets SIGTERM, and SIGKILL with all its descendants GRACE_S later ("inf": never)
    a second one          SIGKILL at once
    PARENT is gone        SIGTERM, and SIGKILL LAST_S later
    the command ended     its remaining descendants get SIGTERM, and SIGKILL LEFTOVERS_S later

It ends as the command ended: with its exit code, or by the same signal.

`supervisor.py --watch PARENT LAST_S` runs no command: LAST_S after PARENT is gone, it kills the remaining
descendants of PARENT. It is for a Ray cluster that PARENT started: two agents of a killed raylet wait more
than a minute for a server that is gone as well.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

REPEATED_S = 1.0  # `timeout` and schedulers send a signal to a process and to its group: that is one request
LEFTOVERS_S = 3.0
POLL_S = 0.2
_UNKILLABLE_S = 5.0  # a process in uninterruptible sleep is left to the kernel
_CANNOT_START = 127  # as shells have it
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends; does nothing outside Linux."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send a signal to this process when the thread that started it ends; Linux only."""
    _prctl(_PR_SET_PDEATHSIG, number)


def list_descendants(ancestor: int) -> list[int]:
    """Returns the ids of the living descendants of a process, parents before children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and (parent := _read_parent_of_living(name)):
            children.setdefault(parent, []).append(int(name))
    below = list(children.get(ancestor, ()))
    for pid in below:  # the list grows during the loop
        below += children.get(pid, ())
    return below


def kill_descendants(ancestor: int, *, patience_s: float = _UNKILLABLE_S) -> None:
    """Kills all descendants of a process; gives up on unkillable ones after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (left := list_descendants(ancestor)) and time.monotonic() < deadline:
        send_signal(left, signal.SIGKILL)
        _reap()
        time.sleep(0.01)


def wait_for_descendants(ancestor: int, patience_s: float) -> None:
    """Waits until a process has no descendants, at most `patience_s`."""
    deadline = time.monotonic() + patience_s
    while list_descendants(ancestor) and time.monotonic() < deadline:
        _reap()
        time.sleep(0.02)


def send_signal(pids: Sequence[int], number: signal.Signals) -> None:
    """Sends a signal to processes; ignores those that are gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def supervise(parent: int, argv: list[str], *, grace_s: float, last_s: float) -> int:
    """Runs a command as the module's docstring describes; returns its wait status."""
    adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS | {signal.SIGCHLD})  # the loop takes them one by one
    command = _start_command(argv)
    status: int | None = None
    deadline, asked_at, is_orphan = math.inf, math.inf, False
    while True:
        heard = signal.sigtimedwait(_STOPS | {signal.SIGCHLD}, POLL_S)
        now = time.monotonic()
        ended = _reap()
        if status is None and command in ended:
            status = ended[command]
            send_signal(list_descendants(os.getpid()), signal.SIGTERM)
            deadline = min(deadline, now + LEFTOVERS_S)
        if status is not None and not list_descendants(os.getpid()):
            return status
        if heard is not None and heard.si_signo in _STOPS:
            if asked_at == math.inf:
                asked_at, deadline = now, min(deadline, now + grace_s)
                if status is None:
                    send_signal([command], signal.SIGTERM)
            elif now > asked_at + REPEATED_S:
                deadline = now
        if os.getppid() != parent and not is_orphan:
            is_orphan, deadline = True, min(deadline, now + last_s)
            if status is None and asked_at == math.inf:
                send_signal([command], signal.SIGTERM)
        if now >= deadline:
            kill_descendants(os.getpid())
            return signal.SIGKILL if status is None else status


def watch(parent: int, *, last_s: float, list_below: Callable[[int], list[int]] = list_descendants) -> None:
    """Waits until `parent`, which started this process, is gone; then ends the parent's descendants.

    What these processes start in their last seconds is ended as well. What was below the parent once counts as long
    as it lives: a process of many threads that is killed stays there for a while after its children got the kernel's
    word of its end, and theirs are below init by then.
    """
    below: dict[int, str] = {}
    while True:
        found = _read_start_times(list_below(parent))
        below = {pid: below[pid] for pid in _select_running(below)} | found
        if os.getppid() != parent:
            break
        time.sleep(POLL_S)
    deadline = time.monotonic() + last_s
    while time.monotonic() < deadline:
        for pid in _select_running(below):
            below |= _read_start_times(list_below(pid))
        time.sleep(POLL_S)
    below.pop(os.getpid(), None)
    send_signal(_select_running(below), signal.SIGKILL)


def _read_start_times(pids: Sequence[int]) -> dict[int, str]:
    return {pid: started for pid in pids if (started := _read_start_time(pid))}


def _select_running(processes: Mapping[int, str]) -> list[int]:
    """Returns the ids of the given processes (id: start time) that are still running."""
    return [pid for pid, started in processes.items() if _read_start_time(pid) == started]


def _read_start_time(pid: int) -> str:
    """Returns a process's start in clock ticks, which tells reused ids apart; "" if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):  # ValueError: a name that was cut within a character
        return ""


def _start_command(argv: list[str]) -> int:
    supervisor = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent()
        for number in (signal.SIGINT, signal.SIGPIPE):  # which Python, or who started us, may have set
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if os.getppid() == supervisor:
            os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"{argv[0]} cannot be started: {error}\n")
        sys.stderr.flush()
    os._exit(_CANNOT_START)


def _reap() -> dict[int, int]:
    """Returns the wait statuses, by process id, of ended children, including adopted ones."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = status


def _read_parent_of_living(pid: str) -> int:
    """Returns the parent of a process; 0 if the process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return 0
    return 0 if state in (b"Z", b"X") else int(parent)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_status(status: int) -> None:
    """Ends this process with the same exit code or signal as `status`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


if __name__ == "__main__":
    if sys.argv[1] == "--watch":
        watch(int(sys.argv[2]), last_s=float(sys.argv[3]))
        sys.exit()
    _end_with_status(supervise(int(sys.argv[1]), sys.argv[4:], grace_s=float(sys.argv[2]), last_s=float(sys.argv[3])))
