"""A process beside the benchmark's own, which keeps what it opened: an engine that several measurements share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

_opened: Any = None  # of this process, once `_open` ran


class Aside(Generic[S]):
    """A fresh process with all cores that holds `open_state(*arguments)`, and what functions find of it."""

    def __init__(self, open_state: Callable[..., S], *arguments: object) -> None:
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_open, initargs=(open_state, arguments)
        )

    def ask(self, function: Callable[[S], T]) -> T:
        """`function(state)`, computed there."""
        return self._process.submit(_call, function).result()

    def __enter__(self) -> Aside[S]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._process.shutdown()


def _open(open_state: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    global _opened
    _opened = open_state(*arguments)


def _call(function: Callable[[Any], T]) -> T:
    return function(_opened)
