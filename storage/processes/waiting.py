"""Prints notices during long waits, so that nobody mistakes a wait for a hang."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

Say = Callable[[str], None]

_FIRST_S = 30.0
_EVERY_S = 60.0

_log = logging.getLogger(__name__)
_listeners: list[Say] = []  # the last one receives the notices of this process


@contextmanager
def send_notices_to(say: Say) -> Iterator[None]:
    """Sends all notices of this process to `say` while the block runs, e.g. to a terminal that shows no logs."""
    _listeners.append(say)
    try:
        yield
    finally:
        _listeners.remove(say)


class Waiting:
    """Sends a notice after `first_s` seconds of waiting, and again every `every_s`, until the block ends.

    Use it as a context manager around calls that may block; a daemon thread sends the notices. They go to
    `say`, else to the listener of `send_notices_to`, else to the log.
    """

    def __init__(
        self,
        subject: str | Callable[[], str],  # such as "Ray to start"; a function is called before each notice,
        # and an empty result suppresses it
        *,
        say: Say | None = None,
        first_s: float = _FIRST_S,
        every_s: float = _EVERY_S,
    ) -> None:
        self._subject = subject
        self._say = say
        self._first_s = first_s
        self._every_s = every_s
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._begun = self._due = 0.0

    def __enter__(self) -> Self:
        self.reset()
        threading.Thread(target=self._send_notices, name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def reset(self, *, first_s: float | None = None) -> None:
        """Starts a new wait, e.g. after an awaited item arrived; `first_s` replaces the old value if given."""
        with self._lock:
            self._first_s = self._first_s if first_s is None else first_s
            self._begun = time.monotonic()
            self._due = self._begun + self._first_s

    def _send_notices(self) -> None:
        while True:
            with self._lock:
                now, begun, due = time.monotonic(), self._begun, self._due
                if now >= due:
                    self._due = now + self._every_s
            if now >= due:
                subject = self._subject if isinstance(self._subject, str) else self._subject()
                if subject and not self._ended.is_set():
                    _send_notice(self._say, f"still waiting for {subject} ({_format_duration(now - begun)} so far)")
            elif self._ended.wait(due - now):
                return


def _send_notice(say: Say | None, notice: str) -> None:
    if say is None and _listeners:
        say = _listeners[-1]
    try:
        _log.warning("%s", notice) if say is None else say(notice)
    except (OSError, ValueError):  # a terminal that has gone away must not end the wait
        _log.warning("%s", notice)


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
