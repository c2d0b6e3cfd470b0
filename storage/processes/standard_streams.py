"""Handles closed standard streams: closed by the parent process (`>&-`) or later by their reader (`head`).

A closed descriptor 0, 1 or 2 is dangerous: the next opened file gets its number, and output of libraries
or children would be written into that file. Such descriptors are redirected to /dev/null.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}  # in the order of their descriptors


def open_closed_streams() -> None:
    """Opens /dev/null for each standard stream that was closed when this process started."""
    for number, (name, mode) in enumerate(_MODES.items()):
        if getattr(sys, name) is not None:
            continue
        if not _is_open(number):
            _redirect_to_null(number)
        stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115 (it stays open to the end)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def drop_output(*streams: IO[str]) -> None:
    """Redirects streams to /dev/null, so that the interpreter's last flush does not fail on a closed pipe.

    Streams without a descriptor, such as a caller's buffer, stay as they are.
    """
    for stream in streams:
        with suppress(io.UnsupportedOperation):
            _redirect_to_null(stream.fileno())


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _redirect_to_null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
        return
    os.dup2(opened, number)
    os.close(opened)
