"""Turns SIGTERM and SIGINT into one exception, and gives the exit code for it.

Every entry point runs within `interruptible()`. Code that must finish something first (a part of a cache,
a training state) delays the signals with `hold_signals()` and polls the event that they set.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from storage.processes.child_process import end_descendants
from storage.processes.supervisor import REPEATED_S, adopt_orphans

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SIGACTION_BYTES = 256  # at least; the C structure is opaque here, and has 152 on Linux
_RESTORE_S = 0.002
_raised: list[int] = []  # signals already raised as exceptions by `interruptible`, which other code may have caught


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT was received; the text says what is kept."""

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        kept = "what is finished is kept, and the same command resumes"
        super().__init__(message or f"stopped by {signal.Signals(number).name}; {kept}")
        self.number = number


@dataclass
class HeldSignals:
    """The signals received within `hold_signals()`."""

    event: threading.Event = field(default_factory=threading.Event)
    number: int | None = None  # of the first signal

    def raise_interrupted(self) -> None:
        """Raises Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number)


def describe_interruption(stop: KeyboardInterrupt) -> str:
    """Returns the message for an interruption, ours or Python's own KeyboardInterrupt."""
    return str(stop if isinstance(stop, Interrupted) else Interrupted())


def get_exit_code(stop: KeyboardInterrupt) -> int:
    """Returns 130 for SIGINT and 143 for SIGTERM, as shells do."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def find_stop_signal(returncode: int) -> int | None:
    """Returns the stop signal that an exit code stands for (negative: killed by it), or None."""
    return next((number for number in STOP_SIGNALS if returncode in (128 + number, -number)), None)


@contextmanager
def interruptible(*, adopt: bool = False) -> Iterator[None]:
    """Makes SIGTERM and SIGINT raise Interrupted while the block runs; a repetition within a second does not.

    `adopt`: this process becomes the parent of orphaned descendants, so that `exit_now` can end them. Does
    nothing outside the main thread.
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
        if _raised and not isinstance(stop, Interrupted):  # Ray's core replaces exceptions of signal handlers
            raise Interrupted(_raised[0]) from stop
        raise
    finally:
        _raised.clear()


@contextmanager
def hold_signals(*, second_raises: bool = True) -> Iterator[HeldSignals]:
    """While the block runs, the first SIGTERM or SIGINT sets an event; a later one raises Interrupted.

    "Later" is a second or more. Outside the main thread it does nothing and the event is never set.
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
    """Exits with `code`: by sys.exit, or at once if `code` stands for an interruption."""
    if find_stop_signal(code) is None:
        exit_on_signals(code)
        sys.exit(code)
    exit_now(code)


def exit_on_signals(code: int) -> None:
    """Makes SIGTERM and SIGINT end this process at once with `code`.

    For a process whose work is done: with some libraries the interpreter needs seconds to exit, and a
    signal during that time would print a traceback or turn success into failure.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda _number, _frame: exit_now(code))


def exit_now(code: int) -> NoReturn:
    """Ends all descendants and then this process at once; flushes stdout and stderr."""
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
    """Keeps the process's handler of a signal while a library replaces it, in Python or in C.

    Ray's core gives SIGTERM the kernel's default action when it is shut down, which takes seconds; Python does not
    notice, so the kernel's entry is written again every two milliseconds. While it starts, Ray has a handler of its
    own, whose SystemExit may get lost; a signal that reached another handler is given to the first one at the end.
    Without such a handler, or elsewhere than in the main thread, nothing happens.
    """
    handler = signal.getsignal(number)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    num_handled = [0]

    def handle(received: int, frame: FrameType | None) -> None:
        num_handled[0] += 1
        handler(received, frame)

    signal.signal(number, handle)
    with _wakeups() as received, _kernel_entry(number):
        try:
            yield
        finally:
            signal.signal(number, handler)
    if received.count(number) > num_handled[0]:
        handler(number, None)


@contextmanager
def _wakeups() -> Iterator[bytearray]:
    """Collects the numbers of the signals that reach Python, whoever handles them; they are there at the end."""
    received = bytearray()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):
            received += os.read(reader, 1 << 16)
        os.close(reader)
        os.close(writer)


@contextmanager
def _kernel_entry(number: signal.Signals) -> Iterator[None]:
    """Writes the kernel's present entry for a signal again and again, from a thread."""
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
