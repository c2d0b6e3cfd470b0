"""Writes the payload of format version 1, as the version that made such caches did: tests of its reader need some."""

from __future__ import annotations

import numpy as np

from storage.encoding.payload_1 import _ROWS_HEADER, PAYLOAD_VERSION
from storage.records.sparse_rows import SparseRows


def encode_rows(rows: SparseRows, *, vocab_size: int, tau: float) -> bytes:
    """The payload of valid rows; the scalars of each row are not in it. ValueError for rows it cannot hold.

    `tau` is the weight of one draw: every sampled entry's weight must be a whole multiple of it.
    """
    exact = rows.is_exact()
    counts = np.rint(np.exp(rows.logprobs[~exact].astype(np.float64)) / max(tau, 1e-9)).astype(np.int64)
    num_sampled = np.diff(rows.offsets) - rows.num_exact
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    length_bytes = _width(max(rows.num_exact.max(initial=0), num_sampled.max(initial=0)))
    count_bytes = _width(counts.max(initial=0))
    header = _ROWS_HEADER.pack(
        PAYLOAD_VERSION,
        id_bytes,
        length_bytes,
        count_bytes,
        rows.num_rows,
        int(exact.sum()),
        len(counts),
        tau if len(counts) else 0.0,
    )
    return b"".join(
        [
            header,
            rows.num_exact.astype(f"<u{length_bytes}").tobytes(),
            num_sampled.astype(f"<u{length_bytes}").tobytes(),
            rows.ids[exact].astype(f"<u{id_bytes}").tobytes(),
            rows.ids[~exact].astype(f"<u{id_bytes}").tobytes(),
            np.minimum(rows.logprobs[exact], 0).astype("<f2").tobytes(),
            counts.astype(f"<u{count_bytes}").tobytes(),
        ]
    )


def _width(largest: int) -> int:
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
