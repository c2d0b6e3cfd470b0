"""Configures the C library's allocator for a process whose many threads allocate large blocks."""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # of glibc's malloc.h


def share_one_arena() -> None:
    """Makes all threads that start from now on share one arena; does nothing without glibc.

    By default each thread keeps freed memory in its own arena, so an actor grows by some hundred megabytes until
    each of its threads has held a part once. Measurement peaks: 2,265 MB by default, 1,674 MB with one arena.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_ARENA_MAX, 1)
