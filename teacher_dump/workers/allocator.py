"""The C library's allocator in a process of many threads, each of which takes large blocks now and then."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_arena() -> None:
    """Let all threads that begin from now on allocate from one arena; does nothing where the C library is not glibc.

    By default each thread has an arena of its own and keeps what it frees there, so that an actor grows by some
    hundred megabytes until the last of its threads has once held a part: measured, a peak of 2,265 MB against 1,674.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
