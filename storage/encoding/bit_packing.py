"""Bit fields of varying width in one byte string, least significant bit first, without a Python loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 31


def pack_bits(values: NDArray[np.int32], widths: NDArray[np.uint8]) -> bytes:
    """The low `widths[i]` (0 to 31) bits of each value, one field after another, padded to a whole byte."""
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


def unpack_bits(packed: bytes | NDArray[np.uint8], widths: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The fields of `pack_bits`. The caller has checked that `packed` is `packed_size(widths)` long."""
    word = np.uint32 if widths.max(initial=0) <= 25 else np.uint64  # holds a field and the 7 bits before it
    padded = np.zeros(len(packed) + 8, np.uint8)
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    wide = np.int32 if len(packed) < 1 << 28 else np.int64  # holds a number of bits
    starts = np.cumsum(widths.astype(wide), dtype=wide)  # twice as fast as letting cumsum convert
    starts -= widths
    # A word from each field's first byte on: an overlapping view, so that one gather reads them.
    windows = np.ndarray((len(packed) + 1,), dtype=np.dtype(word).newbyteorder("<"), buffer=padded.data, strides=(1,))
    fields = windows.take(starts >> 3)
    fields >>= (starts & 7).astype(word)
    fields &= ((np.uint64(1) << np.arange(64, dtype=np.uint64)) - np.uint64(1)).astype(word).take(widths)
    return fields.astype(np.int32)


def packed_size(widths: NDArray[np.uint8]) -> int:
    """Bytes that `pack_bits` makes of fields of these widths."""
    return -(-int(widths.sum(dtype=np.int64)) // 8)
