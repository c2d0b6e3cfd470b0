"""The three matrix products of an output head with its loss: logits, and the gradients of hidden states and head.

Legend: r rows, v vocabulary, d hidden. Results are float32 (float64 for float64 heads) whatever the dtype of head
and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

_HEAD_ROWS = 16_384  # of a low-precision head that are in memory in float32 at once
_HALF_EXPONENT = 12  # float16 slopes are scaled to at most 2^12: 2^36 above its least number, 2^4 below its largest
_LEAST_SLOPE = 2.0**-100  # keeps the factor finite where all slopes are 0
_LOW_PRECISION = (torch.bfloat16, torch.float16)


@runtime_checkable
class HeadProducts(Protocol):
    """How a device multiplies with the head."""

    def logits(self, hidden: Float[Tensor, "r d"], head: Float[Tensor, "v d"], *, out: Float[Tensor, "r v"]) -> None:
        """Write hidden headᵀ into `out`."""
        ...

    def add_gradients_(
        self,
        slopes: Float[Tensor, "r v"],
        hidden: Float[Tensor, "r d"],
        head: Float[Tensor, "v d"],
        *,
        of_hidden: Float[Tensor, "r d"] | None,
        of_head: Float[Tensor, "v d"] | None,
    ) -> None:
        """Write slopes head into `of_hidden` and add slopesᵀ hidden to `of_head`; None is left out."""
        ...


class WideProducts:
    """Converts low-precision inputs to the dtype of the result, a part of the head at a time."""

    def logits(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
        """See HeadProducts."""
        hidden = hidden.to(out.dtype)
        for part, weight in _convert_parts(head, out.dtype):
            torch.mm(hidden, weight.T, out=out[:, part])

    def add_gradients_(
        self, slopes: Tensor, hidden: Tensor, head: Tensor, *, of_hidden: Tensor | None, of_head: Tensor | None
    ) -> None:
        """See HeadProducts."""
        if of_hidden is not None:
            of_hidden.zero_()
            for part, weight in _convert_parts(head, of_hidden.dtype):
                of_hidden.addmm_(slopes[:, part], weight)
        if of_head is not None:
            of_head.addmm_(slopes.T, hidden.to(of_head.dtype))


def multiply_into_float32(left: Tensor, right: Tensor) -> Tensor:
    """left right in float32 sums, for bfloat16 or float16 matrices on a GPU."""
    return torch.mm(left, right, out_dtype=torch.float32)


@dataclass(frozen=True)
class TensorCoreProducts:
    """Multiplies low-precision inputs as they are, with float32 sums, and casts slopes to their dtype.

    Slopes are (q − p) times a loss weight over the rows of the whole global batch, so in a flat row they lie below
    the least float16 number. They are therefore scaled by a power of two before the cast, which is undone on the
    float32 sums: the only rounding left is that of float16's eleven bits.
    """

    multiply: Callable[[Tensor, Tensor], Tensor] = multiply_into_float32

    def logits(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
        """See HeadProducts."""
        out.copy_(self.multiply(hidden.to(head.dtype), head.T))

    def add_gradients_(
        self, slopes: Tensor, hidden: Tensor, head: Tensor, *, of_hidden: Tensor | None, of_head: Tensor | None
    ) -> None:
        """See HeadProducts."""
        low, undo = _cast_slopes(slopes, head.dtype)
        if of_hidden is not None:
            of_hidden.copy_(self.multiply(low, head) * undo)
        if of_head is not None and hidden.dtype == head.dtype:
            of_head.add_(self.multiply(low.T, hidden) * undo)
        elif of_head is not None:  # hidden states of a higher precision than the head keep it
            of_head.addmm_(slopes.T, hidden.to(of_head.dtype))


def select_products(head: Tensor, *, result: torch.dtype) -> HeadProducts:
    """The products for a head of that dtype and device."""
    if head.is_cuda and head.dtype in _LOW_PRECISION and result == torch.float32:
        return TensorCoreProducts()
    return WideProducts()


def _cast_slopes(slopes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Slopes in `dtype`, and the factor that brings products with them back to their size."""
    if dtype != torch.float16:
        return slopes.to(dtype), 1.0
    exponent = torch.frexp(slopes.abs().amax().clamp(min=_LEAST_SLOPE)).exponent
    one = slopes.new_ones(())
    return (slopes * torch.ldexp(one, _HALF_EXPONENT - exponent)).to(dtype), torch.ldexp(one, exponent - _HALF_EXPONENT)


def _convert_parts(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype`, in parts where it has to be converted."""
    step = len(head) if head.dtype == dtype else _HEAD_ROWS
    for start in range(0, len(head), max(1, step)):
        part = slice(start, min(start + step, len(head)))
        yield part, head[part].to(dtype)
