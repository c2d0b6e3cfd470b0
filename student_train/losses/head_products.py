"""Matrix products of an output head: logits, and the gradients of hidden states and head.

Legend: r rows, v vocabulary, d hidden. Results are float32 (float64 for float64 heads) whatever the dtype of head
and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

_HEAD_ROWS = 16_384  # rows of a low-precision head that are held in float32 at once
_HALF_EXPONENT = 12  # float16 slopes are scaled to at most 2^12: 2^36 above its least number, 2^4 below its largest
_LEAST_SLOPE = 2.0**-100  # keeps the factor finite where all slopes are 0
_LOW_PRECISION = (torch.bfloat16, torch.float16)


@runtime_checkable
class HeadProducts(Protocol):
    """The products that a device computes with the head."""

    def compute_logits(
        self, hidden: Float[Tensor, "r d"], head: Float[Tensor, "v d"], *, out: Float[Tensor, "r v"]
    ) -> None:
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
        """Write slopes head into `of_hidden` and add slopesᵀ hidden to `of_head`; skip those that are None."""
        ...


class WideProducts:
    """Converts low-precision inputs to the dtype of the result, a part of the head at a time."""

    def compute_logits(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
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
    """Multiply bfloat16 or float16 matrices on a GPU with float32 sums; return float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


@dataclass(frozen=True)
class TensorCoreProducts:
    """Multiplies low-precision inputs without conversion, with float32 sums, and casts slopes to their dtype.

    Slopes are (q − p) times a loss weight over the rows of the whole global batch, so those of a flat row lie below
    the smallest float16 number. They are scaled by a power of two before the cast, which is undone on the float32
    sums: only the rounding to float16's eleven bits remains.
    """

    multiply: Callable[[Tensor, Tensor], Tensor] = multiply_into_float32

    def compute_logits(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
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


def multiply_into_bfloat16(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bfloat16 matrices on a CPU, which sums in float32 and rounds the result to bfloat16; return float32."""
    return torch.mm(left, right).float()


@dataclass(frozen=True)
class BFloat16CPUProducts:
    """Logits as WideProducts computes them; gradients from bfloat16 slopes, in half of the time.

    Gradients leave the loss in the dtype of head and hidden states, so a result that is rounded to bfloat16 costs one
    rounding a chunk more. A logit that is rounded so would be wrong by up to a 512th of itself: up to 0.06 at 30.
    """

    def compute_logits(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
        """See HeadProducts."""
        WideProducts().compute_logits(hidden, head, out=out)

    def add_gradients_(
        self, slopes: Tensor, hidden: Tensor, head: Tensor, *, of_hidden: Tensor | None, of_head: Tensor | None
    ) -> None:
        """See HeadProducts."""
        products = TensorCoreProducts(multiply_into_bfloat16)
        products.add_gradients_(slopes, hidden, head, of_hidden=of_hidden, of_head=of_head)


def select_products(head: Tensor, *, result: torch.dtype) -> HeadProducts:
    """Return the products for the head's dtype and device, with results of dtype `result`."""
    if result == torch.float32 and head.is_cuda and head.dtype in _LOW_PRECISION:
        return TensorCoreProducts()
    if result == torch.float32 and head.is_cpu and head.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return BFloat16CPUProducts()
    return WideProducts()


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them they take longer than float32's."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """The teacher's head on torch; computes the same logits as storage.encoding.output_head.StoredHead."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def compute_logits(self, hidden: Float[Tensor, "r d"], *, dtype: torch.dtype) -> Float[Tensor, "r v"]:
        """Return raw logits in `dtype`."""
        logits = hidden.new_empty(len(hidden), len(self.weight), dtype=dtype)
        select_products(self.weight, result=dtype).compute_logits(hidden, self.weight, out=logits)
        if self.bias is not None:
            logits += self.bias
        logits *= self.scale
        return logits if self.soft_cap is None else logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)


def _cast_slopes(slopes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Return scaled slopes in `dtype`, and the factor that undoes the scale in products with them."""
    if dtype != torch.float16:
        return slopes.to(dtype), 1.0
    exponent = torch.frexp(slopes.abs().amax().clamp(min=_LEAST_SLOPE)).exponent
    one = slopes.new_ones(())
    return (slopes * torch.ldexp(one, _HALF_EXPONENT - exponent)).to(dtype), torch.ldexp(one, exponent - _HALF_EXPONENT)


def _convert_parts(head: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the head converted to `dtype`; one slice if no conversion is needed."""
    step = len(head) if head.dtype == dtype else _HEAD_ROWS
    for start in range(0, len(head), max(1, step)):
        part = slice(start, min(start + step, len(head)))
        yield part, head[part].to(dtype)
