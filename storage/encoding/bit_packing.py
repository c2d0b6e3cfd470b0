"""Bit fields of varying width in one byte string, least significant bit first, without a Python loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 31


def pack_bits(values: NDArray[np.int32], widths: NDArray[np.int32] | NDArray[np.uint8]) -> bytes:
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


def unpack_bits(packed: bytes | NDArray[np.uint8], widths: NDArray[np.int32], stops: NDArray) -> NDArray[np.int32]:
    """The fields of `pack_bits`, of these `widths`, which stop at `field_stops(widths)`; or some of the fields alone.

    The caller has checked that `packed` reaches to the last stop.
    """
    word = np.uint32 if widths.max(initial=0) <= 25 else np.uint64  # holds a field and the 7 bits before it
    padded = np.zeros(len(packed) + 8, np.uint8)
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    starts = stops - widths
    shifts = (starts & 7).astype(word)
    # A word from each field's first byte on: an overlapping view, so that one gather reads them.
    windows = np.ndarray((len(packed) + 1,), dtype=np.dtype(word).newbyteorder("<"), buffer=padded.data, strides=(1,))
    fields = windows.take(starts >> 3)
    fields >>= shifts
    fields &= (word(1) << widths.astype(word)) - word(1)
    return fields.view(np.int32) if word is np.uint32 else fields.astype(np.int32)


def field_stops(widths: NDArray[np.int32]) -> NDArray:
    """The number of bits up to the end of each field."""
    wide = np.int32 if len(widths) < 1 << 26 else np.int64  # holds a number of bits
    return np.cumsum(widths, dtype=wide)


def bytes_of_bits(num_bits: int) -> int:
    """Bytes that `pack_bits` makes of fields of so many bits."""
    return -(-num_bits // 8)
