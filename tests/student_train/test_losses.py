from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.rows import SparseRows
from student_train.batch import teacher_rows
from student_train.losses import (
    TeacherRows,
    bucketed_forward_kl,
    cross_entropy,
    relation_loss,
    unbiased_forward_kl,
)
from tests.student_train.caches import log_softmax, sparse_rows


def logits(rows: int, vocab: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab))


def student(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def dense_kl(teacher: np.ndarray, values: Tensor) -> Tensor:
    """The sum over rows of KL(teacher || student), in float64."""
    log_p = torch.tensor(log_softmax(teacher))
    return (log_p.exp() * (log_p - values.double().log_softmax(1))).sum()


def merged_kl(rows: SparseRows, values: Tensor) -> Tensor:
    """The bucketed divergence of one row after another, in float64, the rest's probability by subtraction."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(rows.num_rows):
        start, stop = int(rows.offsets[row]), int(rows.offsets[row]) + int(rows.num_exact[row])
        q = values[row].double().softmax(0)
        p = torch.tensor(np.exp(rows.logprobs[start:stop].astype(np.float64)))
        q_head = q[rows.ids[start:stop].astype(np.int64)]
        total = total + (p * (p.log() - q_head.log())).sum()
        p_rest = float(rows.tail_mass[row])
        if p_rest > 0 and stop - start < len(q):
            total = total + p_rest * (np.log(p_rest) - (1 - q_head.sum()).log())
    return total


def assert_same(loss: Tensor, values: Tensor, reference: Tensor, reference_values: Tensor, tolerance: float) -> None:
    """Values and gradients agree."""
    (gradient,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(reference, reference_values)
    torch.testing.assert_close(loss.double(), reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", [bucketed_forward_kl, unbiased_forward_kl])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), vocab=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_with_every_entry_stored_it_is_the_dense_kl(divergence, rows: int, vocab: int, seed: int) -> None:
    teacher, values = logits(rows, vocab, seed), logits(rows, vocab, seed + 1)
    ours, reference = student(values), student(values)
    loss = divergence(ours, teacher_rows([sparse_rows(teacher, k=vocab)]))
    assert_same(loss, ours, dense_kl(teacher, reference), reference, 1e-5)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), vocab=st.integers(3, 40), k=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_bucketed_kl_agrees_with_merging_row_by_row(rows: int, vocab: int, k: int, seed: int) -> None:
    stored = sparse_rows(logits(rows, vocab, seed), k=min(k, vocab))
    values = logits(rows, vocab, seed + 1)
    ours, reference = student(values), student(values)
    loss = bucketed_forward_kl(ours, teacher_rows([stored]))
    assert_same(loss, ours, merged_kl(stored, reference), reference, 2e-5)


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(2, 40), k=st.integers(0, 39), seed=st.integers(0, 10**6))
def test_bucketed_kl_is_a_lower_bound_of_the_dense_kl(vocab: int, k: int, seed: int) -> None:
    teacher, values = logits(3, vocab, seed), student(logits(3, vocab, seed + 1))
    bucketed = bucketed_forward_kl(values, teacher_rows([sparse_rows(teacher, k=min(k, vocab))]))
    assert bucketed.item() <= dense_kl(teacher, values).item() + 1e-5


@pytest.mark.parametrize("k", [0, 1, 7, 30])
def test_divergence_of_a_distribution_from_itself_is_zero(k: int) -> None:
    teacher = logits(6, 30, 0)
    ours = student(teacher)
    loss = bucketed_forward_kl(ours, teacher_rows([sparse_rows(teacher, k=k)]))
    (gradient,) = torch.autograd.grad(loss, ours)
    assert abs(loss.item()) < 6e-6  # the tail mass is a float32 and weighs up to 5 nats, in 6 rows
    assert gradient.abs().max().item() < 1e-6


def test_bucketed_kl_ignores_sampled_entries() -> None:
    teacher, values = logits(4, 50, 1, scale=1.0), student(logits(4, 50, 2))
    sampled = sparse_rows(teacher, tau=0.05)
    counts = [int((np.exp(row) >= 0.05).sum()) for row in log_softmax(teacher)]
    assert sampled.num_exact.tolist() == counts
    assert sampled.num_entries > sum(counts)
    torch.testing.assert_close(
        bucketed_forward_kl(values, teacher_rows([sampled])).double(), merged_kl(sampled, values), rtol=1e-5, atol=1e-5
    )


def test_bucketed_kl_by_hand() -> None:
    teacher = np.log(np.array([[0.5, 0.3, 0.2]]))
    uniform = torch.zeros(1, 3)
    one = 0.5 * np.log(0.5 / (1 / 3)) + 0.5 * np.log(0.5 / (2 / 3))
    two = 0.5 * np.log(1.5) + 0.3 * np.log(0.9) + 0.2 * np.log(0.6)
    assert float(bucketed_forward_kl(uniform, teacher_rows([sparse_rows(teacher, k=1)]))) == pytest.approx(
        one, abs=1e-6
    )
    assert float(bucketed_forward_kl(uniform, teacher_rows([sparse_rows(teacher, k=2)]))) == pytest.approx(
        two, abs=1e-6
    )


def test_unbiased_kl_averages_to_the_dense_kl_and_its_gradient() -> None:
    teacher, values = logits(2, 60, 3, scale=1.5), logits(2, 60, 4)
    ours, reference = student(values), student(values)
    losses, gradients = [], []
    for seed in range(600):
        loss = unbiased_forward_kl(ours, teacher_rows([sparse_rows(teacher, tau=0.08, seed=seed)]))
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, ours)[0])
    dense = dense_kl(teacher, reference)
    (expected,) = torch.autograd.grad(dense, reference)
    standard_error = np.std(losses) / np.sqrt(len(losses))
    assert abs(np.mean(losses) - dense.item()) < 4 * standard_error
    stacked = torch.stack(gradients)
    errors = (stacked.mean(0) - expected).abs() / (stacked.std(0) / np.sqrt(len(losses)) + 1e-4)
    assert float(errors.max()) < 5


@pytest.mark.parametrize("gap", [30.0, 90.0, 1000.0])
def test_a_student_that_leaves_no_rest_gives_finite_values_and_gradients(gap: float) -> None:
    rows = teacher_rows([sparse_rows(logits(1, 20, 5), k=2)])
    values = torch.zeros(1, 20)
    values[0, rows.ids[:1]] = gap
    values.requires_grad_()
    loss = bucketed_forward_kl(values, rows)
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_a_tail_of_zero_is_no_term() -> None:
    stored = sparse_rows(logits(3, 20, 6), k=4)
    head = np.exp(stored.logprobs.reshape(3, 4).astype(np.float64))
    whole = SparseRows(
        **{
            **vars(stored),
            "tail_mass": np.zeros(3, np.float32),
            "logprobs": np.log(head / head.sum(1, keepdims=True)).ravel().astype(np.float32),
        }
    )
    values = logits(3, 20, 7)
    ours, reference = student(values), student(values)
    assert_same(bucketed_forward_kl(ours, teacher_rows([whole])), ours, merged_kl(whole, reference), reference, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    rows = teacher_rows([sparse_rows(logits(4, 64, 8), k=9)])
    low = torch.tensor(logits(4, 64, 9)).to(dtype)
    for divergence in (bucketed_forward_kl, unbiased_forward_kl):
        assert divergence(low, rows).dtype == torch.float32
        torch.testing.assert_close(divergence(low, rows), divergence(low.float(), rows), rtol=0, atol=0)
    labels = torch.arange(4)
    torch.testing.assert_close(cross_entropy(low, labels), cross_entropy(low.float(), labels), rtol=0, atol=0)


def empty_rows() -> TeacherRows:
    return teacher_rows([SparseRows.empty()])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: cross_entropy(z, torch.zeros(0, dtype=torch.int64)),
        lambda z: bucketed_forward_kl(z, empty_rows()),
        lambda z: unbiased_forward_kl(z, empty_rows()),
    ],
)
def test_no_rows_give_zero_attached_to_the_graph(loss) -> None:
    weight = torch.ones(7, requires_grad=True)
    value = loss(torch.zeros(0, 7) * weight)
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


def test_cross_entropy_is_the_sum_of_label_surprises() -> None:
    values, labels = logits(5, 11, 10), np.array([0, 3, 10, 3, 1])
    expected = -log_softmax(values)[np.arange(5), labels].sum()
    assert float(cross_entropy(torch.tensor(values), torch.tensor(labels))) == pytest.approx(expected, rel=1e-6)


def relation_reference(hidden: Tensor, head: Tensor, teacher: Tensor, *, centered: bool) -> Tensor:
    """1 - cosine of Gram matrices of logits that are really formed, image by image, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for image, target in zip(hidden.double(), teacher.double(), strict=True):
        z = image @ head.double().T
        z = z - z.mean(0) if centered else z
        gram = z @ z.T
        total = total + 1 - (gram * target).sum() / (gram.norm() * target.norm())
    return total


@pytest.mark.parametrize("centered", [False, True])
def test_relation_loss_agrees_with_the_gram_matrix_of_logits(centered: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(50, 8, generator=draw)
    factor = torch.randn(3, 6, 4, generator=draw)
    teacher = factor @ factor.mT
    ours = torch.randn(3, 6, 8, generator=draw).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    loss = relation_loss(ours, head.T @ head, teacher, centered=centered)
    assert_same(loss, ours, relation_reference(reference, head, teacher, centered=centered), reference, 1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_a_pooled_relation_loss_averages_the_rows_of_each_block(centered: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    head = torch.randn(50, 8, generator=draw)
    factor = torch.randn(2, 4, 5, generator=draw)
    ours = torch.randn(2, 9, 8, generator=draw).requires_grad_()
    reference = ours.detach().clone().requires_grad_()
    loss = relation_loss(ours, head.T @ head, factor @ factor.mT, centered=centered, pool=2)
    shifted = reference - reference.mean(1, keepdim=True) if centered else reference  # before pooling
    grid = shifted.view(2, 3, 3, 8)
    blocks = [grid[:, r : r + 2, c : c + 2].flatten(1, 2).mean(1) for r in (0, 2) for c in (0, 2)]
    expected = relation_reference(torch.stack(blocks, dim=1), head, factor @ factor.mT, centered=False)
    assert_same(loss, ours, expected, reference, 1e-5)


def test_relation_loss_is_zero_for_a_scaled_copy_and_counts_images() -> None:
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    metric = torch.eye(4)
    own = hidden @ hidden.mT
    assert float(relation_loss(hidden, metric, own * 1e-3)) == pytest.approx(0, abs=1e-6)
    assert float(relation_loss(hidden, metric, torch.zeros(2, 5, 5))) == pytest.approx(2, abs=1e-6)


def test_relation_loss_of_no_images_is_zero_attached_to_the_graph() -> None:
    weight = torch.ones(4, requires_grad=True)
    value = relation_loss(torch.zeros(0, 5, 4) * weight, torch.eye(4) * weight, torch.zeros(0, 5, 5))
    value.backward()
    assert value.item() == 0
    assert weight.grad is not None


def test_teacher_rows_slice_as_the_cache_does() -> None:
    stored = sparse_rows(logits(6, 30, 11), tau=0.06)
    rows = teacher_rows([stored])
    part, expected = rows.slice(2, 5), teacher_rows([stored.slice(2, 5)])
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(part, name), value, rtol=0, atol=0)
    assert rows.row_of_entry().tolist() == stored.row_of_entry().tolist()
