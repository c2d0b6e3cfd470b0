"""The tail profile of a cache: the mean distribution outside its rows' exact entries.

A few parts, spread over the plan, store the sum of all their rows' tails in their file, one byte per
token; a reader averages them. FORMAT.md specifies the bytes. Legend: v vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage.errors import CorruptPartError
from storage.records.records import TailTotal

MAX_PARTS = 8  # parts of a segment that store tails: some hundreds of kB, whatever the cache's size
TAIL_TOTAL_KEY = "stillhouse.tail_total"
_VERSION = 1
_HEADER = struct.Struct("<B3xId")
_MAX_LEVEL = 255
_LEVELS_PER_OCTAVE = 8  # a decoded value is within a factor 2^(1/16): 4.4 %


def select_tail_parts(num_parts: int) -> tuple[int, ...]:
    """Returns the parts of a plan that store their tails: at most MAX_PARTS, evenly spread, from part 0."""
    count = min(num_parts, MAX_PARTS)
    return tuple(number * num_parts // count for number in range(count))


def encode_tail_total(tail: TailTotal) -> str:
    """Encodes a sum of tails as text for a file's metadata. ValueError for an impossible sum."""
    mass = math.fsum(tail.total)
    if not (np.isfinite(tail.total).all() and (tail.total >= 0).all() and mass <= tail.num_rows * (1 + 1e-3)):
        raise ValueError(f"the tails of {tail.num_rows} rows sum to {mass}, with values from {tail.total.min()}")
    levels = np.zeros(len(tail.total), np.uint8)
    there = tail.total > 0
    octaves = np.log2(tail.total[there])
    below = octaves.max(initial=-np.inf) - octaves
    levels[there] = np.rint(np.maximum(_MAX_LEVEL - _LEVELS_PER_OCTAVE * below, 0))
    packed = zstandard.ZstdCompressor(level=9).compress(levels.tobytes())
    return base64.b64encode(_HEADER.pack(_VERSION, tail.num_rows, mass) + packed).decode("ascii")


def decode_tail_total(text: bytes, vocab_size: int) -> TailTotal:
    """Decodes the text of `encode_tail_total`; the total mass is exact. Errors: CorruptPartError."""
    try:
        content = base64.b64decode(text, validate=True)
        version, num_rows, mass = _HEADER.unpack_from(content)
        packed = content[_HEADER.size :]
        if version != _VERSION or zstandard.frame_content_size(packed) != vocab_size:
            raise CorruptPartError(f"the tail total has version {version}, or is not of {vocab_size} tokens")
        levels = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed, read_across_frames=False), np.uint8)
    except (zstandard.ZstdError, struct.error, binascii.Error) as error:
        raise CorruptPartError(f"the tail total: {error}") from error
    if not 0 <= mass <= num_rows * (1 + 1e-3) or (mass > 0) != bool(levels.any()):
        raise CorruptPartError(f"the tail total has the mass {mass} of {num_rows} rows")
    table: NDArray[np.float64] = 2.0 ** ((np.arange(_MAX_LEVEL + 1) - _MAX_LEVEL) / _LEVELS_PER_OCTAVE)
    table[0] = 0.0
    values = table.take(levels)
    return TailTotal(values * (mass / max(values.sum(), 1e-300)), num_rows)


def read_tail_total(metadata: Mapping[bytes, bytes] | None, vocab_size: int) -> TailTotal | None:
    """Reads the sum of tails from a file's key-value metadata, or None. Errors: CorruptPartError."""
    text = (metadata or {}).get(TAIL_TOTAL_KEY.encode())
    return None if text is None else decode_tail_total(text, vocab_size)


def compute_mean_profile(groups: Sequence[tuple[Sequence[TailTotal], int]], vocab_size: int) -> NDArray[np.float32]:
    """Returns (v,) the mean tail, normalised to sum 1.

    `groups`: per segment its sums of tails and the number of its rows, which is its weight. Uniform if no
    row has a tail, as it then has no weight in a loss.
    """
    mean = np.zeros(vocab_size)
    for tails, num_rows in groups:
        seen = sum(tail.num_rows for tail in tails)
        for tail in tails:
            mean += tail.total * (num_rows / max(seen, 1))
    mass = mean.sum()
    return (mean / mass if mass > 0 else np.full(vocab_size, 1 / vocab_size)).astype(np.float32)
