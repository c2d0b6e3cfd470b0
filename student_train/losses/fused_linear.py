"""The output head fused with the losses of its logits: logits exist for one chunk of rows at a time.

Legend: r rows, d hidden, w rows of the head (w >= v), v vocabulary.
Gradients are computed in the forward pass, while a chunk's logits are in memory, and multiplied by the incoming
gradient in the backward pass. So the head is multiplied three times, as in plain cross-entropy. Losses are computed in
float32 whatever the input's dtype; gradients of bfloat16 and float16 inputs may come from slopes of their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.losses.head_products import HeadProducts, select_products
from student_train.losses.sparse_divergence import BUCKET_SPEC, LossSpec, RowSums, TeacherRows, differentiate_rows_


@dataclass(frozen=True, eq=False)
class HeadLossTask:
    """Rows of the student and what they are compared with; one task for all rows that share spec and weights."""

    hidden: Float[Tensor, "r d"]
    labels: Int[Tensor, " r"] | None = None
    teacher: TeacherRows | Float[Tensor, "r c"] | None = None  # stored rows; or states that `spec.head` turns into rows
    spec: LossSpec = BUCKET_SPEC
    label_weight: float = 1.0
    weight: float = 1.0  # of the divergence


def fused_head_loss(
    weight: Float[Tensor, "w d"],
    tasks: Sequence[HeadLossTask],
    *,
    bias: Float[Tensor, " w"] | None = None,
    vocab_size: int | None = None,
    chunk_logits: int = 1 << 27,
    products: HeadProducts | None = None,
) -> tuple[Float[Tensor, ""], list[RowSums]]:
    """Return the weighted sum of all tasks' losses, and each task's unweighted sums, detached.

    Rows of the head from `vocab_size` on are ignored and get no gradient. `chunk_logits`: elements of logits in
    memory at once. `products`: how the head is multiplied; default: chosen by its dtype and device. The loss allows
    one backward pass; a second raises RuntimeError. No rows give 0, attached to the graph.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    products = products or select_products(weight, result=_select_dtype(weight))
    settings = _HeadSettings(tuple(tasks), vocab_size, chunk_logits, torch.is_grad_enabled(), products)
    loss, sums = _FusedHead.apply(settings, weight, bias, *(task.hidden for task in tasks))
    return loss, [RowSums(*each.unbind()) for each in sums.unbind()]


@dataclass(frozen=True, eq=False)
class _HeadSettings:
    tasks: tuple[HeadLossTask, ...]
    vocab_size: int
    chunk_logits: int
    gradient: bool
    products: HeadProducts


def _select_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _HeadSettings, weight: Tensor, bias: Tensor | None, *hiddens: Tensor) -> Any:
        dtype = _select_dtype(weight)
        needed = [settings.gradient and needs for needs in ctx.needs_input_grad[1:]]
        gradients = _Gradients(
            torch.zeros_like(weight, dtype=dtype) if needed[0] else None,
            None if bias is None or not needed[1] else torch.zeros_like(bias, dtype=dtype),
            [torch.empty_like(h, dtype=dtype) if need else None for h, need in zip(hiddens, needed[2:], strict=True)],
        )
        head = weight[: settings.vocab_size]
        chunks = [_split_rows(len(hidden), max(1, settings.chunk_logits // settings.vocab_size)) for hidden in hiddens]
        most = max((rows.stop - rows.start for each in chunks for rows in each), default=0)
        buffer = weight.new_empty(most, settings.vocab_size, dtype=dtype)
        sums = weight.new_zeros(len(hiddens), 2, dtype=torch.float64)
        for number, (task, hidden) in enumerate(zip(settings.tasks, hiddens, strict=True)):
            for rows in chunks[number]:
                chunk = hidden[rows]
                logits = buffer[: len(chunk)]
                settings.products.compute_logits(chunk, head, out=logits)
                if bias is not None:
                    logits += bias[: settings.vocab_size]
                found = _differentiate_chunk_(logits, task, rows, gradient=any(needed))
                sums[number] += torch.stack([found.cross_entropy, found.divergence])
                if any(needed):
                    gradients.add(number, rows, logits, chunk, head, settings.products)
        weights = [[0.0 if t.labels is None else t.label_weight, t.weight] for t in settings.tasks]
        loss = (sums * sums.new_tensor(weights).view(-1, 2)).sum().to(dtype)
        ctx.gradients = gradients
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias, *hiddens)]
        sums = sums.to(dtype)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the fused head's gradients were used up by an earlier backward pass")
        tensors = (gradients.weight, gradients.bias, *gradients.hidden)
        scaled = (None if each is None else each.mul_(incoming[0]) for each in tensors)
        return None, *(None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True))


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Accumulators of gradients, in the computing dtype; None for gradients that are not needed."""

    weight: Tensor | None  # (w, d)
    bias: Tensor | None  # (w,)
    hidden: list[Tensor | None]  # of each task (r, d)

    def add(self, task: int, rows: slice, slopes: Tensor, chunk: Tensor, head: Tensor, products: HeadProducts) -> None:
        """Add the gradients of some rows; `slopes`: the gradient of their logits."""
        of_hidden = self.hidden[task]
        products.add_gradients_(
            slopes,
            chunk,
            head,
            of_hidden=None if of_hidden is None else of_hidden[rows],
            of_head=None if self.weight is None else self.weight[: len(head)],
        )
        if self.bias is not None:
            self.bias[: len(head)] += slopes.sum(0)


def _split_rows(num_rows: int, most: int) -> list[slice]:
    """Split rows into nearly equal ranges of at most `most`; products of very few rows are slow."""
    number = -(-num_rows // most)
    edges = [num_rows * n // number for n in range(number + 1)] if number else []
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _differentiate_chunk_(logits: Tensor, task: HeadLossTask, rows: slice, *, gradient: bool) -> RowSums:
    teacher = None if task.teacher is None else task.teacher[rows]
    if isinstance(teacher, Tensor):
        assert task.spec.head is not None
        teacher = task.spec.head.compute_logits(teacher, dtype=logits.dtype)
    labels = None if task.labels is None else task.labels[rows]
    weights = {"label_weight": task.label_weight, "weight": task.weight}
    return differentiate_rows_(logits, labels, teacher, task.spec, **weights, gradient=gradient)
