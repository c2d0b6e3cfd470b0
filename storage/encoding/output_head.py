"""The teacher's output head, stored once per cache as a safetensors file, and logits computed with it.

<cache>/head/head.<12 hex of its sha256>.safetensors holds `weight` (v, d), optionally `bias` (v), and the
scale and soft-cap as metadata. It turns the rows of the family `hidden` into full-vocabulary rows.

Legend: r rows, v vocabulary, d hidden.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptPartError

MAX_HEADER_BYTES = 1 << 16
_CHUNK = 8192  # vocabulary rows converted to float32 at a time
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, eq=False)
class StoredHead:
    """An output head: logits = soft_cap * tanh(x / soft_cap) with x = (hidden weight^T + bias) * scale.

    Without a soft-cap, logits = x.
    """

    weight: NDArray[Any]  # (v, d) float32, float16, or uint16: the bits of bfloat16
    bias: NDArray[np.float32] | None = None  # (v,)
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """v, the real vocabulary size."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """d, the size of a hidden state."""
        return self.weight.shape[1]

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns (r, v) float32 logits of (r, d) hidden states, over the real vocabulary.

        Weights are converted to float32 in chunks. Errors: ValueError for states of another width.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.width:
            raise ValueError(f"hidden states have the shape {hidden.shape}, the head needs (rows, {self.width})")
        logits = np.empty((len(hidden), self.vocab_size), np.float32)
        for start in range(0, self.vocab_size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            np.matmul(hidden, _to_float32(self.weight[chunk]).T, out=logits[:, chunk])
        if self.bias is not None:
            logits += self.bias
        logits *= np.float32(self.scale)
        if self.soft_cap is not None:
            logits = np.tanh(logits / np.float32(self.soft_cap)) * np.float32(self.soft_cap)
        return logits

    def logprobs(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns (r, v) logprobs (natural logarithm) of (r, d) hidden states, normalised in float64."""
        logits = self.logits(hidden).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def make_head(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> StoredHead:
    """Makes a head whose float32 weights are stored in the smallest dtype that represents them exactly."""
    head = StoredHead(_narrow_weight(weight), bias, float(scale), None if soft_cap is None else float(soft_cap))
    _check_head(head)
    return head


def encode_head(head: StoredHead) -> bytes:
    """Encodes a head as a file's content; equal heads give equal bytes. ValueError for an invalid head."""
    _check_head(head)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    metadata = {"scale": repr(head.scale)} | ({} if head.soft_cap is None else {"soft_cap": repr(head.soft_cap)})
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        kind = names[tensor.dtype.newbyteorder("<")]
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffers = [np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).tobytes() for tensor in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *buffers])


def decode_head(content: bytes | memoryview) -> StoredHead:
    """Decodes a head from a file's content, whose memory it shares. CorruptPartError for invalid bytes."""
    view = memoryview(content).cast("B")
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise CorruptPartError(f"output head of {len(view)} bytes has no valid safetensors header")
    try:
        head = _parse_head(json.loads(bytes(view[8 : 8 + length])), view[8 + length :])
        _check_head(head)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise CorruptPartError(f"output head violates FORMAT.md: {error}") from error
    return head


def _parse_head(entries: Any, data: memoryview) -> StoredHead:
    if not isinstance(entries, dict) or not {"weight"} <= entries.keys() <= {"weight", "bias", "__metadata__"}:
        raise ValueError("its header must name weight, maybe bias, and nothing else")
    names = [name for name in ("weight", "bias") if name in entries]
    tensors: dict[str, NDArray[Any]] = {}
    start = 0
    for name in names:
        dtype, shape = _DTYPES[entries[name]["dtype"]], entries[name]["shape"]
        if not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
            raise ValueError(f"{name} has the shape {shape}")
        stop = start + dtype.itemsize * math.prod(shape)
        if entries[name]["data_offsets"] != [start, stop] or stop > len(data):
            raise ValueError(f"{name} lies at {entries[name]['data_offsets']}, expected {[start, stop]}")
        tensors[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
        start = stop
    if start != len(data):
        raise ValueError(f"it has {len(data)} bytes of data, its tensors need {start}")
    metadata = entries.get("__metadata__", {})
    cap = metadata.get("soft_cap")
    return StoredHead(
        tensors["weight"], tensors.get("bias"), float(metadata["scale"]), None if cap is None else float(cap)
    )


def _check_head(head: StoredHead) -> None:
    """Raises ValueError unless shapes, dtypes and values are valid for a head."""
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype.newbyteorder("<") not in _DTYPES.values():
        raise ValueError(
            f"a head's weight must be (v, d) in float32, float16 or bfloat16, got {weight.dtype}{weight.shape}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != np.float32):
        raise ValueError(f"a head's bias must be float32[{len(weight)}], got {bias.dtype}{bias.shape}")
    if not math.isfinite(head.scale) or not (head.soft_cap is None or 0 < head.soft_cap < math.inf):
        raise ValueError(f"a head has the scale {head.scale} and the soft-cap {head.soft_cap}")
    finite = all(_is_finite(weight[start : start + _CHUNK]) for start in range(0, len(weight), _CHUNK))
    if not finite or (bias is not None and not np.isfinite(bias).all()):
        raise ValueError("a head holds a value that is not a finite number")


def _is_finite(weight: NDArray[Any]) -> bool:
    return bool(np.isfinite(_to_float32(weight)).all())


def _to_float32(weight: NDArray[Any]) -> NDArray[np.float32]:
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float32, copy=False)


def _narrow_weight(weight: NDArray[np.float32]) -> NDArray[Any]:
    if weight.dtype != np.float32:
        raise ValueError(f"a head's weight must be given as float32, got {weight.dtype}")
    weight = np.ascontiguousarray(weight)
    chunks = [weight[start : start + _CHUNK] for start in range(0, len(weight), _CHUNK)]
    if not any((chunk.view(np.uint32) & 0xFFFF).any() for chunk in chunks):
        return (weight.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        halves = all(np.array_equal(chunk.astype(np.float16).astype(np.float32), chunk) for chunk in chunks)
    return weight.astype(np.float16) if halves else weight
