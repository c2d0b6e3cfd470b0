from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storage.encoding.relation_matrix import assign_grid_blocks
from storage.records.records import PooledRelation, Relation, RelationFactor, RelationMatrix
from student_train.losses.relation import (
    TeacherRelations,
    compute_head_gram,
    make_resampling_matrix,
    relation_loss,
    stack_relations,
)

HEAD = torch.randn(50, 8, generator=torch.Generator().manual_seed(5))


def teacher(images: int, size: int, *, rank: int = 4, seed: int = 0) -> TeacherRelations:
    """Normalise matrices to norm 1; keep their norms."""
    return stack_relations(matrices(images, size, rank=rank, seed=seed), size=size)


def matrices(images: int, size: int, *, rank: int = 4, seed: int = 0) -> list[RelationMatrix]:
    draw = np.random.default_rng(seed)
    found = []
    for number in range(images):
        factor = draw.normal(size=(size, rank)) * (number + 1)
        gram = factor @ factor.T
        norm = float(np.linalg.norm(gram))
        found.append(RelationMatrix((gram / norm).astype(np.float32), norm))
    return found


def student(images: int, size: int, *, seed: int = 1) -> Tensor:
    return torch.randn(images, size, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gram_of_logits(hidden: Tensor, *, centered: bool = False) -> Tensor:
    """Compute relation matrices (i, n, n) in float64 from materialised logits."""
    logits = hidden.double() @ HEAD.double().T
    logits = logits - logits.mean(1, keepdim=True) if centered else logits
    return logits @ logits.mT


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours * theirs).sum((1, 2)) / (ours.flatten(1).norm(dim=1) * theirs.flatten(1).norm(dim=1))


def assert_same(loss: Tensor, values: Tensor, reference: Tensor, reference_values: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(reference, reference_values)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("size", [6, 20])
def test_the_loss_agrees_with_gram_matrices_of_logits(centered: bool, size: int) -> None:
    """With fewer and with more rows than hidden dimensions."""
    ours, reference, cached = student(3, size), student(3, size), teacher(3, size)
    loss = relation_loss(ours, HEAD.T @ HEAD, cached, centered=centered)
    expected = (1 - cosines(gram_of_logits(reference, centered=centered), cached.values.double())).sum()
    assert_same(loss, ours, expected, reference)


@pytest.mark.parametrize("centered", [False, True])
def test_factors_give_the_same_loss_as_their_matrices(centered: bool) -> None:
    """Make factors of several ranks, one of them 0 (a zero matrix)."""
    draw = np.random.default_rng(3)
    factors: list[RelationFactor] = []
    for rank in (3, 0, 5):
        factor = draw.normal(size=(9, rank))
        scale = np.sqrt(np.linalg.norm(factor.T @ factor)) if rank else 1.0
        factors.append(RelationFactor((factor / scale).astype(np.float32), 2.0 * (rank > 0)))
    whole = [RelationMatrix(factor.values, factor.norm) for factor in factors]
    low_rank, full = stack_relations(factors, size=9), stack_relations(whole, size=9)
    assert low_rank.factored
    assert low_rank.values.shape == (3, 9, 5)
    assert not full.factored
    for literal in (False, True):
        ours, reference = student(3, 9), student(3, 9)
        losses = [
            relation_loss(rows, HEAD.T @ HEAD, cached, centered=centered, literal=literal)
            for rows, cached in ((ours, low_rank), (reference, full))
        ]
        assert_same(losses[0], ours, losses[1].double(), reference)


def test_factors_mixed_with_matrices_become_matrices() -> None:
    mixed: list[Relation] = [RelationFactor(np.array([[1], [0]], np.float32), 3.0), *matrices(1, 2)]
    cached = stack_relations(mixed, size=2)
    assert not cached.factored
    assert cached.values[0].tolist() == [[1, 0], [0, 0]]
    assert cached.norms.tolist() == pytest.approx([3.0, mixed[1].norm])


@pytest.mark.parametrize("centered", [False, True])
def test_a_pooled_relation_averages_the_rows_of_each_block(centered: bool) -> None:
    ours, reference = student(2, 9), student(2, 9)
    pooled = [PooledRelation(each.values, each.norm, num_visual_tokens=9, pool=2) for each in matrices(2, 4)]
    cached = stack_relations(pooled, size=4)
    loss = relation_loss(
        ours, HEAD.T @ HEAD, cached, centered=centered, resampling=make_resampling_matrix(9, 9, pool=2)
    )
    shifted = reference - reference.mean(1, keepdim=True) if centered else reference  # before pooling
    grid = shifted.view(2, 3, 3, 8)
    blocks = [grid[:, r : r + 2, c : c + 2].flatten(1, 2).mean(1) for r in (0, 2) for c in (0, 2)]
    expected = (1 - cosines(gram_of_logits(torch.stack(blocks, dim=1)), cached.values.double())).sum()
    assert_same(loss, ours, expected, reference)


def test_literal_is_one_cosine_of_all_matrices_concatenated() -> None:
    """As in the published code: flattened raw Gram matrices of a batch, so larger matrices weigh more."""
    ours, reference, cached = student(3, 6), student(3, 6), teacher(3, 6)
    loss = relation_loss(ours, HEAD.T @ HEAD, cached, literal=True)
    raw = cached.values.double() * cached.norms.double()[:, None, None]
    flat = torch.nn.functional.cosine_similarity(gram_of_logits(reference).flatten(), raw.flatten(), dim=0)
    assert_same(loss, ours, 3 * (1 - flat), reference)
    assert loss.item() != pytest.approx(relation_loss(ours, HEAD.T @ HEAD, cached).item(), rel=1e-3)
    first = stack_relations(matrices(1, 6), size=6)
    single = [relation_loss(ours[:1], HEAD.T @ HEAD, first, literal=each).item() for each in (False, True)]
    assert single[0] == pytest.approx(single[1], rel=1e-5)


def test_a_scaled_copy_has_loss_0_and_zeros_have_loss_1_each() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    own = hidden @ hidden.mT
    norms = own.flatten(1).norm(dim=1)
    copy = TeacherRelations(own / norms[:, None, None], norms)
    assert float(relation_loss(hidden, torch.eye(4), copy)) == pytest.approx(0, abs=1e-6)
    zeros = TeacherRelations(torch.zeros(2, 5, 5), torch.zeros(2))
    for literal in (False, True):
        for rows, cached in ((hidden, zeros), (torch.zeros(2, 5, 4), copy)):
            rows = rows.clone().requires_grad_()
            loss = relation_loss(rows, torch.eye(4), cached, literal=literal)
            (gradient,) = torch.autograd.grad(loss, rows)
            assert loss.item() == pytest.approx(2, abs=1e-6)
            assert torch.isfinite(gradient).all()


def test_no_images_are_zero_attached_to_the_graph() -> None:
    weight = torch.ones(4, requires_grad=True)
    none = stack_relations([], size=5)
    value = relation_loss(torch.zeros(0, 5, 4) * weight, torch.eye(4) * weight, none)
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gram_and_its_gradient_use_the_real_vocabulary(dtype: torch.dtype) -> None:
    ours = torch.randn(70, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    reference = ours.detach().double().requires_grad_()
    factor = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))  # not symmetric
    head_gram, expected = compute_head_gram(ours, vocab_size=60), reference[:60].T @ reference[:60]
    torch.testing.assert_close(head_gram.double(), expected, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad((head_gram * factor).sum(), ours)
    (theirs,) = torch.autograd.grad((expected * factor).sum(), reference)
    assert gradient.dtype == dtype
    assert not gradient[60:].any()
    torch.testing.assert_close(gradient.double(), theirs, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4)


@given(side=st.integers(1, 12))
def test_equal_grids_are_not_resampled(side: int) -> None:
    assert make_resampling_matrix(side**2, side**2) is None
    assert make_resampling_matrix(728, 728) is None  # nor one that is no square
    matrix = make_resampling_matrix(side**2, side**2, pool=1)
    assert matrix is not None
    torch.testing.assert_close(matrix, torch.eye(side**2), rtol=0, atol=0)


@given(ours=st.integers(1, 12), theirs=st.integers(1, 12), pool=st.none() | st.integers(2, 5))
def test_resampling_keeps_constants_and_means(ours: int, theirs: int, pool: int | None) -> None:
    matrix = make_resampling_matrix(ours**2, theirs**2, pool=pool)
    if matrix is None:
        return
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    if pool is None or theirs % pool == 0:  # all cells have the same area
        torch.testing.assert_close(matrix.mean(0), torch.full((ours**2,), 1 / ours**2))


@given(side=st.integers(1, 12), pool=st.integers(2, 5))
def test_a_pooled_grid_matches_the_cache_s(side: int, pool: int) -> None:
    matrix = make_resampling_matrix(side**2, side**2, pool=pool)
    assert matrix is not None
    block = assign_grid_blocks(side**2, pool)
    expected = torch.zeros(block.max() + 1, side**2)
    expected[block, torch.arange(side**2)] = 1
    torch.testing.assert_close(matrix, expected / expected.sum(1, keepdim=True))


def test_resampling_by_hand() -> None:
    """2 cells resampled to 3: the middle one lies half in each. For squares, each row is a product of two."""
    matrix = make_resampling_matrix(4, 9)
    assert matrix is not None
    line = torch.tensor([[1, 0], [0.5, 0.5], [0, 1]])
    torch.testing.assert_close(matrix, torch.kron(line, line))
    back = make_resampling_matrix(9, 4)
    assert back is not None
    line = torch.tensor([[2, 1, 0], [0, 1, 2]]) / 3
    torch.testing.assert_close(back, torch.kron(line, line))
    for pair in ((4, 10), (10, 4)):
        with pytest.raises(ValueError, match="10 visual tokens are not a square grid"):
            make_resampling_matrix(*pair)
