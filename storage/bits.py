"""Bit fields of varying width in one byte string, least significant bit first, without a Python loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 32


def pack_bits(values: NDArray[np.int64], widths: NDArray[np.int64]) -> bytes:
    """The low `widths[i]` (0 to 32) bits of each value, one field after another, padded to a whole byte."""
    stops = np.cumsum(widths, dtype=np.int64)
    num_bits = int(stops[-1]) if len(stops) else 0
    used = widths > 0
    fields, starts = values[used].astype(np.uint64), (stops - widths)[used]
    words = np.zeros(num_bits // 64 + 2, np.uint64)
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    if len(word):
        first = np.flatnonzero(np.diff(word, prepend=-1))  # fields are in order, so words are runs
        words[word[first]] = np.bitwise_or.reduceat(fields << shift, first)
        spills = shift > 32  # of one word at most one field reaches into the next
        spilled = fields[spills] >> (np.uint64(64) - shift[spills])
        np.bitwise_or.at(words, word[spills] + 1, spilled)
    return words.astype("<u8").tobytes()[: -(-num_bits // 8)]


def unpack_bits(packed: bytes | NDArray[np.uint8], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fields of `pack_bits`. The caller has checked that `packed` is `packed_size(widths)` long."""
    padded = np.zeros(len(packed) + 8, np.uint8)
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    starts = np.cumsum(widths, dtype=np.int64) - widths
    # Eight bytes from each field's first byte on: an overlapping view, so that one gather reads them.
    windows = np.ndarray((len(packed) + 1,), dtype="<u8", buffer=padded.data, strides=(1,))
    fields = windows[starts >> 3] >> (starts & 7).astype(np.uint64)
    return (fields & ((np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1))).astype(np.int64)


def packed_size(widths: NDArray[np.int64]) -> int:
    """Bytes that `pack_bits` makes of fields of these widths."""
    return -(-int(widths.sum()) // 8)
