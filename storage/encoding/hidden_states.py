"""The payload of final-norm hidden states: float16, or int8 with a scale per row. FORMAT.md specifies the bytes.

Legend: r rows, d hidden.
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptPartError

PAYLOAD_VERSION = 1
MAX_FLOAT16 = 65504.0
_HEADER = struct.Struct("<BBxxII")  # version, kind, r, d
_FLOAT16, _INT8 = 0, 1


def encode_hidden(states: NDArray[np.float32], encoding: Literal["float16", "int8"]) -> bytes:
    """Encodes (r, d) hidden states. ValueError for other arrays, or values beyond float16 if so encoded."""
    if states.ndim != 2 or states.dtype != np.float32 or not np.isfinite(states).all():
        raise ValueError(f"hidden states must be finite float32[r, d], got {states.dtype}{states.shape}")
    largest = float(np.abs(states).max(initial=0))
    if encoding == "float16":
        if largest > MAX_FLOAT16:
            raise ValueError(
                f"a hidden state of {largest:.6g} is beyond float16, at most {MAX_FLOAT16:.0f}; "
                "set cache.hidden.encoding to int8"
            )
        return _HEADER.pack(PAYLOAD_VERSION, _FLOAT16, *states.shape) + states.astype("<f2").tobytes()
    scales = np.abs(states).max(axis=1, initial=0) / np.float32(127)  # (r,)
    codes = np.rint(np.divide(states, scales[:, None], out=np.zeros_like(states), where=scales[:, None] > 0))
    content = scales.astype("<f4").tobytes() + np.clip(codes, -127, 127).astype(np.int8).tobytes()
    return _HEADER.pack(PAYLOAD_VERSION, _INT8, *states.shape) + content


def decode_hidden(payload: bytes | memoryview) -> NDArray[np.float32]:
    """Decodes a payload into (r, d) hidden states. CorruptPartError for an invalid payload."""
    view = memoryview(payload).cast("B")
    if len(view) < _HEADER.size or any(view[2:4]):
        raise CorruptPartError(f"hidden payload of {len(view)} bytes has no valid header")
    version, kind, num_rows, width = _HEADER.unpack_from(view)
    if version != PAYLOAD_VERSION or kind not in (_FLOAT16, _INT8):
        raise CorruptPartError(f"hidden payload has version {version} and kind {kind}, expected 1 and 0 or 1")
    expected = _HEADER.size + (2 * num_rows * width if kind == _FLOAT16 else num_rows * (4 + width))
    if len(view) != expected or width == 0:
        raise CorruptPartError(f"hidden payload has {len(view)} bytes, ({num_rows}, {width}) needs {expected}")
    content = view[_HEADER.size :]
    if kind == _FLOAT16:
        states = np.frombuffer(content, "<f2").astype(np.float32).reshape(num_rows, width)
    else:
        scales = np.frombuffer(content[: 4 * num_rows], "<f4")
        if not ((scales >= 0) & (scales <= np.finfo(np.float32).max / 128)).all():
            raise CorruptPartError("hidden payload has a scale that is negative or not finite")
        codes = np.frombuffer(content[4 * num_rows :], np.int8).reshape(num_rows, width)
        states = codes.astype(np.float32) * scales[:, None].astype(np.float32)
    if not np.isfinite(states).all():
        raise CorruptPartError("hidden payload holds a value that is not a finite number")
    return states


def read_hidden_encoding(payload: bytes | memoryview) -> Literal["float16", "int8"]:
    """Returns the encoding of a valid payload."""
    return "float16" if memoryview(payload).cast("B")[1] == _FLOAT16 else "int8"


def compute_relative_errors(states: NDArray[np.float32], decoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns (r,) ||decoded - states|| / ||states||; 0 for a row of zeros."""
    difference = np.linalg.norm(decoded.astype(np.float64) - states, axis=1)
    norms = np.linalg.norm(states.astype(np.float64), axis=1)
    return np.divide(difference, norms, out=np.zeros_like(norms), where=norms > 0).astype(np.float32)
