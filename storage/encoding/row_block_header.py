"""The header of a block of sparse rows and the planes behind it, checked before anything is allocated.

FORMAT.md has the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage.errors import CorruptPartError

BLOCK_VERSION = 4
MAX_ROWS = 1 << 16
MAX_SETS = 64  # of draws
BYTE_LEVEL = 255  # the largest level that is a byte
WIDE_LEVEL = 65535  # of levels of two bytes
_MAX_ENTRIES = 1 << 27  # of a block; what a reader will allocate for
_START = struct.Struct("<BBBBII")
_EXACT = struct.Struct("<dff5I")
_SET = struct.Struct("<5I")
_EXACT_PLANES = ("num_exact", "exact_groups", "exact_places", "values", "first_choices")
_SET_PLANES = ("num_sampled", "sampled_groups", "sampled_places", "draws")


@dataclass(frozen=True)
class Header:
    """What a block says of itself, checked against its length, and of one of its sets of draws."""

    length_bytes: int  # of a count of entries: 1, 2 or 4
    draw_bytes: int  # of a count of draws: 1, 2 or 4
    num_sets: int
    num_rows: int
    num_exact: int
    num_sampled: int  # of the set
    tau: float  # the weight of one draw; 0 without sampled entries
    step: float  # of sqrt(p); 0 where values are float32 logprobs
    lowest: float  # the probability at level 0
    planes: Mapping[str, slice]  # where in the block: those of the exact entries and of the set


def level_type(step: float) -> tuple[str, int]:
    """How levels of such a step of sqrt(p) are written, and the largest: sqrt(1) must have one."""
    return ("u1", BYTE_LEVEL) if step >= 1 / BYTE_LEVEL else ("<u2", WIDE_LEVEL)


def pack_header(
    length_bytes: int,
    draw_bytes: int,
    *,
    num_rows: int,
    num_exact: int,
    num_sampled: Sequence[int],  # of each set
    tau: float,
    step: float,
    lowest: float,
    plane_bytes: Sequence[Sequence[int]],  # of the exact entries, then of each set
) -> bytes:
    """A header's bytes."""
    header = _START.pack(BLOCK_VERSION, length_bytes, draw_bytes, len(num_sampled), num_rows, num_exact)
    header += _EXACT.pack(tau if any(num_sampled) else 0.0, step, lowest, *plane_bytes[0])
    return header + b"".join(
        _SET.pack(count, *sizes) for count, sizes in zip(num_sampled, plane_bytes[1:], strict=True)
    )


def read_header(view: memoryview, draw_set: int = 0) -> Header:
    """The header of a block, for one of its sets of draws (modulo their number). Errors: CorruptPartError."""
    try:
        if view[0] != BLOCK_VERSION:
            raise CorruptPartError(f"the block has version {view[0]}, expected {BLOCK_VERSION}")
        header, end = _header_of_sets(view, draw_set)
    except (struct.error, IndexError) as error:
        raise CorruptPartError(f"a block of {len(view)} bytes is shorter than its header") from error
    if header.length_bytes not in (1, 2, 4) or header.draw_bytes not in (1, 2, 4):
        raise CorruptPartError(f"the block has widths {header.length_bytes} and {header.draw_bytes}; not 1, 2 or 4")
    if len(view) != end:
        raise CorruptPartError(f"the block has {len(view)} bytes, its header needs {end}")
    num_entries = header.num_exact + header.num_sampled
    if header.num_rows > MAX_ROWS or num_entries > _MAX_ENTRIES:
        raise CorruptPartError(f"the block claims {header.num_rows} rows and {num_entries} entries")
    if not (0 < header.tau < 1 or (header.tau == 0 and header.num_sampled == 0)):
        raise CorruptPartError(f"the block has {header.num_sampled} sampled entries and tau {header.tau}")
    largest_lowest = header.step**2 if header.step else 0.0  # or levels would not fall with probabilities
    if not (header.step == 0 or 1 / WIDE_LEVEL <= header.step <= 1) or not 0 <= header.lowest <= largest_lowest:
        raise CorruptPartError(f"the block has the step {header.step} and the lowest probability {header.lowest}")
    return header


def _header_of_sets(view: memoryview, draw_set: int) -> tuple[Header, int]:
    """The header, and where the block must end."""
    _, length_bytes, draw_bytes, num_sets, num_rows, num_exact = _START.unpack_from(view)
    if not 1 <= num_sets <= MAX_SETS:
        raise CorruptPartError(f"the block has {num_sets} sets of draws, expected 1 to {MAX_SETS}")
    tau, step, lowest, *exact_sizes = _EXACT.unpack_from(view, _START.size)
    first = _START.size + _EXACT.size
    sets = [_SET.unpack_from(view, first + number * _SET.size) for number in range(num_sets)]
    number = draw_set % num_sets
    end = first + num_sets * _SET.size
    planes = {}
    for names, sizes in (
        (_EXACT_PLANES, exact_sizes),
        *((_SET_PLANES, each[1:]) for each in sets[: number + 1]),
    ):
        for name, size in zip(names, sizes, strict=True):
            planes[name] = slice(end, end + size)  # of the last set that is gone through: the one asked for
            end += size
    end += sum(sum(each[1:]) for each in sets[number + 1 :])
    sampled = sets[number][0]
    return Header(length_bytes, draw_bytes, num_sets, num_rows, num_exact, sampled, tau, step, lowest, planes), end


class Planes:
    """A block's compressed planes, each decompressed once, to the size that is expected of it."""

    def __init__(self, view: memoryview, header: Header) -> None:
        self._view = view
        self._slices = header.planes
        self._decompressor = zstandard.ZstdDecompressor()  # making one costs as much as a small plane

    def take(self, name: str, kind: str, count: int) -> NDArray:
        """A plane as `count` numbers. Errors: CorruptPartError."""
        plane, expected = self._view[self._slices[name]], np.dtype(kind).itemsize * count
        if expected == 0:
            if len(plane):
                raise CorruptPartError(f"the block's plane {name} should be empty")
            return np.zeros(0, kind)
        try:
            if zstandard.frame_content_size(plane) != expected:
                raise CorruptPartError(f"the block's plane {name} does not hold {expected} bytes")
            content = self._decompressor.decompress(plane, read_across_frames=False)
        except zstandard.ZstdError as error:
            raise CorruptPartError(f"the block's plane {name}: {error}") from error
        if len(content) != expected:
            raise CorruptPartError(f"the block's plane {name} has {len(content)} bytes, expected {expected}")
        return np.frombuffer(content, kind)
