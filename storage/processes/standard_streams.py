"""Standard streams that are closed: by whoever started this process (`>&-`), or later by whoever reads them (`head`).

A descriptor 0, 1 or 2 that is closed is worse than one that leads nowhere: the next file that is opened gets its
number, and what a library or a child prints would be written into that file.
"""

from __future__ import annotations

import os
import sys
from typing import IO

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}  # in the order of their descriptors


def open_closed_streams() -> None:
    """Opens /dev/null in place of each standard stream that this process was started without."""
    for number, (name, mode) in enumerate(_MODES.items()):
        if getattr(sys, name) is not None:
            continue
        if not _is_open(number):
            _redirect_to_null(number)
        stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115 (it stays open to the end)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def drop_output(*streams: IO[str]) -> None:
    """What these have yet to write goes nowhere, so that the interpreter's last flush finds no closed pipe."""
    for stream in streams:
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
