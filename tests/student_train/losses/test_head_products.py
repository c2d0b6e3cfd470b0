from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student_train.data.collate import make_teacher_rows
from student_train.losses.fused_linear import HeadLossTask, fused_head_loss
from student_train.losses.head_products import BFloat16CPUProducts, HeadProducts, TensorCoreProducts, WideProducts
from tests.student_train.caches import sparse_rows

V, D, ROWS = 4096, 32, 24


def imitate_tensor_cores(left: Tensor, right: Tensor) -> Tensor:
    """Multiply low-precision inputs exactly and sum in float32, as a GPU does."""
    assert left.dtype == right.dtype
    assert left.dtype in (torch.float16, torch.bfloat16)
    return left.float() @ right.float()


TENSOR_CORES = TensorCoreProducts(imitate_tensor_cores)


def relative_errors(
    dtype: torch.dtype, *, total_rows: int, sharpness: float, loss_scale: float, products: HeadProducts = TENSOR_CORES
) -> list[float]:
    """Return the relative errors of the gradients of hidden states and head, against float64 on the same inputs."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, D, generator=draw).to(dtype).requires_grad_()
    weight = (sharpness * torch.randn(V, D, generator=draw)).to(dtype).requires_grad_()
    teacher = sharpness * torch.randn(ROWS, V, generator=draw, dtype=torch.float64)
    rows = make_teacher_rows(sparse_rows(teacher.numpy(), k=16))
    share = 1 / total_rows

    def task(hidden: Tensor) -> HeadLossTask:
        return HeadLossTask(hidden, None, rows, weight=share)

    loss, _ = fused_head_loss(weight, [task(hidden)], products=products)
    ours = torch.autograd.grad(loss_scale * loss, [hidden, weight])
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    reference, _ = fused_head_loss(wide[1], [task(wide[0])])
    expected = torch.autograd.grad(loss_scale * reference, wide)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]


@pytest.mark.parametrize("sharpness", [0.003, 1.0])
@pytest.mark.parametrize("total_rows", [1_000, 19_200, 100_000, 10_000_000])
def test_float16_slopes_keep_their_digits_however_many_rows_share_the_loss(total_rows: int, sharpness: float) -> None:
    """Flat rows of a large batch: their slopes, (q - p) / rows, lie far below the least float16 number.

    The loss scale is large enough for the gradients that come out, which are float16 themselves.
    """
    errors = relative_errors(torch.float16, total_rows=total_rows, sharpness=sharpness, loss_scale=2.0**12 * total_rows)
    assert max(errors) < 2e-3


def test_bfloat16_slopes_need_no_scale() -> None:
    assert max(relative_errors(torch.bfloat16, total_rows=100_000, sharpness=0.003, loss_scale=1.0)) < 1e-2


def test_a_cpu_of_bfloat16_rounds_gradients_and_not_the_loss() -> None:
    products = BFloat16CPUProducts()
    errors = relative_errors(torch.bfloat16, total_rows=100_000, sharpness=0.003, loss_scale=1.0, products=products)
    assert max(errors) < 1e-2
    draw = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(rows, D, generator=draw).bfloat16() for rows in (ROWS, V))
    logits, wide = torch.empty(ROWS, V), torch.empty(ROWS, V)
    products.compute_logits(hidden, head, out=logits)
    WideProducts().compute_logits(hidden, head, out=wide)
    assert torch.equal(logits, wide)


def test_slopes_that_are_all_zero_or_huge_stay_finite() -> None:
    hidden, head = torch.ones(2, 4, dtype=torch.float16), torch.ones(3, 4, dtype=torch.float16)
    for value in (0.0, 1e-30, 1e30):
        slopes = torch.full((2, 3), value)
        of_hidden, of_head = torch.full((2, 4), torch.nan), torch.zeros(3, 4)
        TENSOR_CORES.add_gradients_(slopes, hidden, head, of_hidden=of_hidden, of_head=of_head)
        torch.testing.assert_close(of_hidden, torch.full((2, 4), 3 * value), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(of_head, torch.full((3, 4), 2 * value), rtol=1e-3, atol=0.0)
