"""SIGTERM and SIGINT as one exception, and the exit code that each command line makes of it.

Every entry point runs within `interruptible()`. Whoever has something to finish first (a part of a cache, a state of
a training) holds the signals with `hold_signals()` and looks at the event that they set.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from storage.processes.child_process import end_descendants
from storage.processes.supervisor import REPEATED_S, adopt_orphans

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SIGACTION_BYTES = 256  # at least; the C structure is opaque here, and has 152 on Linux
_RESTORE_S = 0.002
_raised: list[int] = []  # signals that `interruptible` has made exceptions of, which a bare `except` may have caught


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT has come; the text says what is kept."""

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        kept = "what is finished is kept, and the same command resumes"
        super().__init__(message or f"stopped by {signal.Signals(number).name}; {kept}")
        self.number = number


@dataclass
class HeldSignals:
    """What has come within `hold_signals()`."""

    event: threading.Event = field(default_factory=threading.Event)
    number: int | None = None  # of the first signal

    def raise_interrupted(self) -> None:
        """Interrupted, if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


def describe_interruption(stop: KeyboardInterrupt) -> str:
    """What to tell a person about an interruption, whoever raised it."""
    return str(stop if isinstance(stop, Interrupted) else Interrupted())


def get_exit_code(stop: KeyboardInterrupt) -> int:
    """130 after SIGINT and 143 after SIGTERM, as shells have it."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def find_stop_signal(returncode: int) -> int | None:
    """The signal that has stopped a command which ended with this exit code (negative: died of it), or None."""
    return next((number for number in STOP_SIGNALS if returncode in (128 + number, -number)), None)


@contextmanager
def interruptible(*, adopt: bool = False) -> Iterator[None]:
    """Within it SIGTERM and SIGINT raise Interrupted in the main thread, a repetition soon after not.

    `adopt`: this process inherits orphans among its descendants, so that `exit_now` finds them. Elsewhere than in the
    main thread nothing changes.
    """
    if adopt:
        adopt_orphans()
    last = [-REPEATED_S]

    def interrupt(number: int, _frame: FrameType | None) -> None:
        now, before = time.monotonic(), last[0]
        last[0] = now
        if now >= before + REPEATED_S:
            _raised.append(number)
            raise Interrupted(number)

    try:
        with _install_handlers(interrupt):
            yield
    except KeyboardInterrupt as stop:
        if _raised and not isinstance(stop, Interrupted):  # Ray's core makes its own of whatever a handler raises
            raise Interrupted(_raised[0]) from stop
        raise
    finally:
        _raised.clear()


@contextmanager
def hold_signals(*, second_raises: bool = True) -> Iterator[HeldSignals]:
    """Within it the first SIGTERM or SIGINT sets an event; another one, a second later or more, raises Interrupted.

    Elsewhere than in the main thread nothing changes, and the event is never set.
    """
    held, first_at = HeldSignals(), [0.0]

    def hold(number: int, _frame: FrameType | None) -> None:
        if held.number is None:
            held.number, first_at[0] = number, time.monotonic()
            held.event.set()
        elif second_raises and time.monotonic() >= first_at[0] + REPEATED_S:
            raise Interrupted(number)

    with _install_handlers(hold):
        if _raised:
            hold(_raised[0], None)
        yield held


def end_process(code: int) -> NoReturn:
    """sys.exit; after an interruption at once, for nothing that the interpreter's end may wait for is needed then."""
    if find_stop_signal(code) is None:
        exit_on_signals(code)
        sys.exit(code)
    exit_now(code)


def exit_on_signals(code: int) -> None:
    """From now on SIGTERM and SIGINT end this process at once, with the code that it was to end with.

    For a process whose work is done: the interpreter's own end takes seconds after some libraries, and a signal in
    them would print a traceback, or make a failure of what is finished.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda _number, _frame: exit_now(code))


def exit_now(code: int) -> NoReturn:
    """End this process now, after every process below it; what is printed is printed."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_descendants()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a signal's handler within another flush
            continue
    os._exit(code)


@contextmanager
def keep_handler(number: signal.Signals) -> Iterator[None]:
    """Within it Python's handler of a signal is in force again at most some milliseconds after C code has replaced it.

    Ray's core gives SIGTERM the kernel's default action when it is shut down, which takes seconds, and another
    handler while it starts; Python does not notice. In the main thread of a process that handles the signal.
    """
    if not callable(signal.getsignal(number)):
        yield
        return
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(_SIGACTION_BYTES)
    libc.sigaction(int(number), None, action)
    done = threading.Event()

    def restore() -> None:
        while not done.wait(_RESTORE_S):
            libc.sigaction(int(number), action, None)

    thread = threading.Thread(target=restore, name=f"keeps the handler of {number.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        libc.sigaction(int(number), action, None)


@contextmanager
def _install_handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
