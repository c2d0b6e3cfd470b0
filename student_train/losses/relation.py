"""The relation loss between the student's visual rows and the teacher's cached relation matrices.

Legend: i images, n visual tokens of the student, m those of the teacher (or blocks of its pooled grid), k rank
of a factor, d hidden, w rows of the head. Computed in float32 whatever the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from storage.records.records import Relation, RelationFactor

_LEAST_NORM = 1e-8  # product of two norms: a zero matrix has the cosine 0
_LEAST_SQUARE = 1e-30  # under a square root, whose slope at 0 is infinite
_HEAD_ROWS = 16_384  # rows of a low-precision head that are held in float32 at once


@dataclass(frozen=True, eq=False)
class TeacherRelations:
    """The teacher's G / ||G|| of each image (0 for G = 0), as matrices or as factors F with F F^T = G / ||G||."""

    values: Float[Tensor, "i m k"]  # k is m unless they are factors
    norms: Float[Tensor, " i"]  # of G
    factored: bool = False

    def to(self, device: torch.device) -> TeacherRelations:
        """Return the same matrices on another device."""
        return TeacherRelations(self.values.to(device), self.norms.to(device), self.factored)

    def compute_inner_products(
        self, rows: Float[Tensor, "i m d"], head_gram: Float[Tensor, "d d"]
    ) -> Float[Tensor, " i"]:
        """Return <G_t / ||G_t||, G_s> with the student's matrix G_s = Z Z^T.

        For factors this is ||F^T Z||^2, computed without an (m, m) matrix.
        """
        if not self.factored:
            return (self.values * (rows @ head_gram @ rows.mT)).sum((1, 2))
        projected = self.values.mT @ rows  # (i, k, d)
        return (projected @ head_gram * projected).sum((1, 2))

    def compute_squared_norms(self) -> Float[Tensor, " i"]:
        """Return the squared norms of the stored matrices: 1 or 0, up to rounding."""
        values = self.values.mT @ self.values if self.factored else self.values
        return (values**2).sum((1, 2))


def stack_relations(relations: Sequence[Relation], *, size: int) -> TeacherRelations:
    """Stack the relations of images with `size` rows each; as factors, padded to the largest rank, if all are."""
    norms = torch.tensor([each.norm for each in relations], dtype=torch.float32)
    factors = [each.factor for each in relations if isinstance(each, RelationFactor)]
    factored = 0 < len(factors) == len(relations)
    arrays = factors if factored else [each.values for each in relations]
    width = max(1, *(each.shape[1] for each in factors)) if factored else size
    values = np.zeros((len(arrays), size, width), np.float32)
    for number, array in enumerate(arrays):
        values[number, :, : array.shape[1]] = array
    return TeacherRelations(torch.from_numpy(values), norms, factored)


def relation_loss(
    hidden: Float[Tensor, "i n d"],
    head_gram: Float[Tensor, "d d"],
    teacher: TeacherRelations,
    *,
    centered: bool = False,
    resampling: Float[Tensor, "m n"] | None = None,
    weights: Float[Tensor, " i"] | None = None,
    literal: bool = False,
) -> Float[Tensor, ""]:
    """Sum 1 - cosine between the teacher's and the student's relation matrix over images.

    `weights`: of each image in the sum; default 1.

    The student's matrix is G = H (W^T W) H^T = Z Z^T with `head_gram` W^T W and Z the raw logits of the visual rows,
    which are never materialised. The cosine ignores the scale of either matrix. With `centered` the mean visual row
    is subtracted first, as the cache records for the teacher; `resampling` then maps rows to the teacher's grid.
    `literal` follows the published code: one cosine of all images' matrices, unscaled and concatenated, which counts
    once for each image. Both are the same for one image.

    Source: LLaVA-KD (arXiv 2410.16236), RDist.
    """
    hidden, head_gram = hidden.float(), head_gram.float()
    if hidden.shape[0] == 0:
        return 0 * (hidden.sum() + head_gram.sum())
    if centered:
        hidden = hidden - hidden.mean(1, keepdim=True)
    if resampling is not None:
        hidden = resampling @ hidden  # (i, m, d)
    inner = teacher.compute_inner_products(hidden, head_gram)
    product = hidden.mT @ hidden @ head_gram  # (i, d, d): ||H M H^T||^2 = tr(A M A M), with A = H^T H
    student = (product * product.mT).sum((1, 2))
    if not literal:
        losses = 1 - _compute_cosine(inner, student, teacher.compute_squared_norms())
        return losses.sum() if weights is None else (losses * weights).sum()
    norms = teacher.norms.double()
    raw = (teacher.compute_squared_norms().double() * norms**2).sum()
    weight = hidden.shape[0] if weights is None else weights.sum()
    return weight * (1 - _compute_cosine((inner.double() * norms).sum(), student.double().sum(), raw)).float()


def _compute_cosine(inner: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the cosine of an inner product and two squared norms; 0, with finite gradients, if a norm is 0."""
    return inner / (ours.clamp_min(_LEAST_SQUARE).sqrt() * theirs.sqrt()).clamp_min(_LEAST_NORM)


@lru_cache(maxsize=4)
def make_resampling_matrix(
    num_student: int, num_teacher: int, *, pool: int | None = None
) -> Float[Tensor, "m n"] | None:
    """Return the matrix that maps rows from the student's square grid to the teacher's; None if the grids are equal.

    Each mapped row is the mean over the area of a cell of the teacher's grid, or of a block of pool x pool cells (see
    storage.encoding.relation_matrix.assign_grid_blocks). Logits are linear in hidden states, so resampling hidden
    states resamples logits; the teacher's rows are not changed. ValueError for token counts that are not squares.
    """
    if num_student == num_teacher and pool is None:
        return None
    ours, theirs = _compute_side(num_student), _compute_side(num_teacher)
    block = 1 if pool is None else pool
    cells = np.arange(ours + 1) * theirs  # edges, both in units of 1 / (ours * theirs)
    blocks = np.append(np.arange(0, theirs, block), theirs) * ours
    low, high = np.maximum(blocks[:-1, None], cells[:-1]), np.minimum(blocks[1:, None], cells[1:])
    line = np.maximum(high - low, 0) / np.diff(blocks)[:, None]
    return torch.from_numpy(np.kron(line, line)).float()


def _compute_side(num_tokens: int) -> int:
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or side == 0:
        raise ValueError(f"{num_tokens} visual tokens are not a square grid")
    return side


def compute_head_gram(weight: Float[Tensor, "w d"], *, vocab_size: int) -> Float[Tensor, "d d"]:
    """Compute W^T W of the first `vocab_size` rows of a head, in float32."""
    return _HeadGram.apply(weight, vocab_size)


class _HeadGram(torch.autograd.Function):
    """W^T W; saves the weight for the backward pass (ZeRO-3 gathers it again) rather than a float32 copy."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, vocab_size: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.vocab_size = vocab_size
        head_gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
        for start in range(0, vocab_size, _HEAD_ROWS):
            part = weight[start : min(start + _HEAD_ROWS, vocab_size)].float()
            head_gram.addmm_(part.T, part)
        return head_gram

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        symmetric = incoming[0] + incoming[0].T
        gradient = torch.zeros_like(weight)
        for start in range(0, ctx.vocab_size, _HEAD_ROWS):
            part = slice(start, min(start + _HEAD_ROWS, ctx.vocab_size))
            gradient[part] = weight[part].float() @ symmetric
        return gradient, None
