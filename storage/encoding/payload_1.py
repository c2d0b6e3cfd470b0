"""The payload of sparse rows in format version 1, which is read but no longer written. FORMAT.md has the bytes.

Everything read is checked before it is used: a payload's length must be exactly what its header says,
so no allocation is larger than a small multiple of the payload. Little-endian throughout.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptPartError
from storage.records.sparse_rows import SparseRows

PAYLOAD_VERSION = 1
ROUNDED_HEAD_TOLERANCE = 0.02  # probability; float16 logprobs move a head by at most entropy / 2048

_ROWS_HEADER = struct.Struct("<BBBBIIId")  # version, bytes an id, a length, a count; r, exact, sampled, tau


def decode_rows(
    payload: bytes | memoryview,
    *,
    vocab_size: int,
    tail_mass: NDArray[np.float32],
    entropy: NDArray[np.float32],
    label_logprob: NDArray[np.float32] | None = None,
) -> SparseRows:
    """The rows of a payload, beside their scalars. The head of each row sums to 1 - tail_mass.

    Errors: CorruptPartError for any bytes that are not the payload of as many valid rows.
    """
    view = memoryview(payload).cast("B")
    widths, num_rows, total_exact, total_sampled, tau = _read_rows_header(view)
    if not num_rows == len(tail_mass) == len(entropy):
        raise CorruptPartError(f"payload has {num_rows} rows, its scalar columns have {len(tail_mass)}")
    if label_logprob is not None and len(label_logprob) != num_rows:
        raise CorruptPartError(f"payload has {num_rows} rows, label_logprob has {len(label_logprob)}")
    id_kind, length_kind, count_kind = (f"<u{width}" for width in widths)
    cursor = _ROWS_HEADER.size

    def take(kind: str, count: int) -> NDArray:
        nonlocal cursor
        start, cursor = cursor, cursor + np.dtype(kind).itemsize * count
        return np.frombuffer(view[start:cursor], dtype=kind)

    num_exact = take(length_kind, num_rows).astype(np.int64)
    num_sampled = take(length_kind, num_rows).astype(np.int64)
    exact_ids, sampled_ids = take(id_kind, total_exact), take(id_kind, total_sampled)
    head = take("<f2", total_exact).astype(np.float64)
    draws = take(count_kind, total_sampled)
    if num_exact.sum() != total_exact or num_sampled.sum() != total_sampled:
        raise CorruptPartError("payload: row lengths do not sum to the header's totals")
    for ids in (exact_ids, sampled_ids):
        if ids.size and int(ids.max()) >= vocab_size:
            raise CorruptPartError(f"payload: id {int(ids.max())} is outside 0..{vocab_size - 1}")
    exact_row = np.repeat(np.arange(num_rows), num_exact)
    head = _rescaled(head, exact_row, tail_mass)
    if (draws == 0).any():
        raise CorruptPartError("payload: a sampled entry has no draws")
    sampled_row = np.repeat(np.arange(num_rows), num_sampled)
    if ((sampled_row[1:] == sampled_row[:-1]) & (sampled_ids[1:] <= sampled_ids[:-1])).any():
        raise CorruptPartError("payload: sampled ids are not ascending")

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_exact + num_sampled)])
    ids = np.empty(total_exact + total_sampled, np.int32)
    logprobs = np.empty(len(ids), np.float32)
    exact_at = np.arange(total_exact) + np.repeat(np.cumsum(num_sampled) - num_sampled, num_exact)
    sampled_at = np.arange(total_sampled) + np.repeat(np.cumsum(num_exact), num_sampled)
    ids[exact_at], ids[sampled_at] = exact_ids, sampled_ids
    logprobs[exact_at] = head
    logprobs[sampled_at] = np.log(draws * tau)
    return SparseRows(
        offsets=offsets,
        ids=ids,
        logprobs=logprobs,
        num_exact=num_exact.astype(np.int32),
        tail_mass=tail_mass,
        entropy=entropy,
        log_sum_exp=np.zeros((num_rows, 0), np.float32),
        label_logprob=label_logprob,
    )


def _read_rows_header(view: memoryview) -> tuple[tuple[int, int, int], int, int, int, float]:
    if len(view) < _ROWS_HEADER.size:
        raise CorruptPartError(f"payload of {len(view)} bytes is shorter than a header, {_ROWS_HEADER.size}")
    version, *widths, num_rows, exact, sampled, tau = _ROWS_HEADER.unpack_from(view)
    id_bytes, length_bytes, count_bytes = widths
    if version != PAYLOAD_VERSION:
        raise CorruptPartError(f"payload has version {version}, expected {PAYLOAD_VERSION}")
    if id_bytes not in (2, 4) or length_bytes not in (1, 2, 4) or count_bytes not in (1, 2, 4):
        raise CorruptPartError(f"payload has widths {id_bytes}, {length_bytes}, {count_bytes}; not 1, 2 or 4")
    expected = _ROWS_HEADER.size + 2 * length_bytes * num_rows + (id_bytes + 2) * exact
    expected += (id_bytes + count_bytes) * sampled
    if len(view) != expected:
        raise CorruptPartError(f"payload has {len(view)} bytes, its header needs {expected}")
    if not (0 < tau < 1 if sampled else tau == 0):
        raise CorruptPartError(f"payload has {sampled} sampled entries and tau {tau}")
    return (id_bytes, length_bytes, count_bytes), num_rows, exact, sampled, tau


def _rescaled(head: NDArray[np.float64], row: NDArray[np.int64], tail_mass: NDArray) -> NDArray[np.float64]:
    """Exact logprobs shifted so that each row's sum is 1 - tail_mass, undoing float16 rounding."""
    if not np.isfinite(head).all() or (head > 0).any():
        raise CorruptPartError("payload: an exact logprob is above 0 or not finite")
    if ((row[1:] == row[:-1]) & (head[1:] > head[:-1])).any():
        raise CorruptPartError("payload: exact logprobs are not falling")
    if not ((tail_mass >= 0) & (tail_mass <= 1)).all():
        raise CorruptPartError("a tail mass is outside 0..1")
    wanted = 1.0 - tail_mass.astype(np.float64)
    present = np.bincount(row, np.exp(head), len(tail_mass))
    if (np.abs(present - wanted) > ROUNDED_HEAD_TOLERANCE).any():
        raise CorruptPartError("payload: exact entries and tail mass do not sum to 1")
    has_head = present > 0
    if (wanted[has_head] <= 0).any():
        raise CorruptPartError("payload: the tail mass is 1 beside exact entries")
    shift = np.zeros(len(tail_mass))
    shift[has_head] = np.log(wanted[has_head] / present[has_head])
    return head + shift[row]
