from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from storage.encoding.output_head import make_head
from student_train.data.collate import make_teacher_rows
from student_train.losses.config import TREATMENTS, Divergence, Treatment
from student_train.losses.fused_linear import HeadLossTask, fused_head_loss
from student_train.losses.head_products import BFloat16CPUProducts, HeadProducts, TeacherHead, WideProducts
from student_train.losses.sparse_divergence import LossSpec, TailProfile, TeacherRows
from tests.hypothesis_profiles import examples
from tests.student_train.caches import sparse_rows
from tests.student_train.references import dense_loss, sparse_loss

V, D, PADDED = 40, 6, 45  # the head has rows beyond the vocabulary
ALL = [(divergence, treatment) for divergence, treatments in TREATMENTS.items() for treatment in treatments]


class Case:
    """Random student rows with a head and teacher rows, and a slow reference of the loss."""

    def __init__(self, rows: int, spec: LossSpec, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        draw = np.random.default_rng(seed)
        self.spec = replace(spec, column=0)
        self.hidden = torch.tensor(draw.normal(size=(rows, D))).to(dtype).requires_grad_()
        self.weight = torch.tensor(draw.normal(size=(PADDED, D))).to(dtype).requires_grad_()
        self.bias = torch.tensor(draw.normal(size=PADDED)).to(dtype).requires_grad_()
        self.labels = torch.tensor(draw.integers(0, V, rows))
        self.profile = draw.gamma(0.3, size=V)
        self.teacher_hidden = draw.normal(size=(rows, 9)).astype(np.float32)
        self.teacher_head = make_head(draw.normal(size=(V, 9)).astype(np.float32), scale=0.7, soft_cap=8.0)
        self.teacher = self.teacher_head.logits(self.teacher_hidden).astype(np.float64)
        tempered = torch.tensor(self.teacher).log_softmax(1) / spec.temperature
        unbiased = spec.treatment == "unbiased"
        self.stored = sparse_rows(self.teacher, tau=0.05) if unbiased else sparse_rows(self.teacher, k=5)
        self.stored = replace(self.stored, log_sum_exp=tempered.logsumexp(1).float().numpy()[:, None])

    def teacher_rows(self) -> TeacherRows | Tensor:
        return (
            torch.from_numpy(self.teacher_hidden) if self.spec.treatment == "exact" else make_teacher_rows(self.stored)
        )

    def loss_spec(self) -> LossSpec:
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        profile = TailProfile.from_mass(torch.from_numpy(self.profile), temperature=self.spec.temperature, dtype=dtype)
        head = TeacherHead(torch.from_numpy(self.teacher_head.weight), scale=0.7, soft_cap=8.0)
        return replace(self.spec, profile=profile, head=head)

    def task(self) -> HeadLossTask:
        return HeadLossTask(
            self.hidden, self.labels, self.teacher_rows(), self.loss_spec(), label_weight=0.7, weight=0.3
        )

    def fused(self, *, chunk_logits: int = 1 << 20, products: HeadProducts | None = None) -> Tensor:
        settings: Any = {"vocab_size": V, "chunk_logits": chunk_logits, "products": products}
        return fused_head_loss(self.weight, [self.task()], bias=self.bias, **settings)[0]

    def reference(self) -> Tensor:
        logits = (self.hidden.double() @ self.weight.double().T + self.bias.double())[:, :V]
        surprise = nn.functional.cross_entropy(logits, self.labels, reduction="sum")
        if self.spec.treatment == "exact":
            return 0.7 * surprise + 0.3 * dense_loss(self.teacher, logits, self.spec)
        tempered = self.stored.log_sum_exp[:, 0]
        return 0.7 * surprise + 0.3 * sparse_loss(self.stored, tempered, logits, self.spec, self.profile)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of hidden states, head and bias, for an incoming gradient that is not 1."""
        return [each.double() for each in torch.autograd.grad(1.7 * loss, [self.hidden, self.weight, self.bias])]


@pytest.mark.parametrize(("divergence", "treatment"), ALL)
@settings(max_examples=examples(6))
@given(
    rows=st.integers(1, 9), seed=st.integers(0, 10**6), temperature=st.sampled_from([1.0, 2.0]),
    chunk=st.sampled_from([1, 2 * V, 5 * V, 1 << 20]),
)  # fmt: skip
def test_value_and_gradients_agree_with_whole_logits(
    divergence: Divergence, treatment: Treatment, rows: int, seed: int, temperature: float, chunk: int
) -> None:
    case = Case(rows, LossSpec(divergence, treatment, 1.0 if treatment == "unbiased" else temperature), seed=seed)
    loss, reference = case.fused(chunk_logits=chunk), case.reference()
    torch.testing.assert_close(
        loss, reference, rtol=2e-5, atol=2e-5
    )  # a tail at temperature 2 is 1 less float32 numbers
    for ours, expected in zip(case.gradients(loss), case.gradients(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("divergence", "treatment"), ALL)
def test_gradients_are_differences_of_the_value(divergence: Divergence, treatment: Treatment) -> None:
    """Along a random direction of all inputs, without the slow reference."""
    case = Case(3, LossSpec(divergence, treatment))
    inputs = [case.hidden, case.weight, case.bias]
    draw = torch.Generator().manual_seed(3)
    directions = [torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in inputs]
    slope = sum((a * b).sum() for a, b in zip(case.gradients(case.fused()), directions, strict=True)) / 1.7
    values = []
    with torch.no_grad():
        for offset in (-1e-6, 2e-6):
            for each, direction in zip(inputs, directions, strict=True):
                each += offset * direction
            values.append(case.fused())
    torch.testing.assert_close((values[1] - values[0]) / 2e-6, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("divergence", "treatment"), ALL)
def test_low_precision_is_accumulated_in_float32(divergence: Divergence, treatment: Treatment) -> None:
    """bfloat16 costs only the rounding of the results: the reference computes on the same inputs."""
    case = Case(8, LossSpec(divergence, treatment), dtype=torch.bfloat16)
    loss, reference = case.fused(chunk_logits=3 * V, products=WideProducts()), case.reference()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, [case.hidden, case.weight, case.bias])
    assert {each.dtype for each in gradients} == {torch.bfloat16}
    expected = torch.autograd.grad(reference, [case.hidden, case.weight, case.bias])
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(("divergence", "treatment"), ALL)
def test_products_of_a_cpu_with_bfloat16_round_slopes(divergence: Divergence, treatment: Treatment) -> None:
    case = Case(8, LossSpec(divergence, treatment), dtype=torch.bfloat16)
    loss, reference = case.fused(chunk_logits=3 * V, products=BFloat16CPUProducts()), case.reference()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    inputs = [case.hidden, case.weight, case.bias]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(reference, inputs), strict=True):
        assert (ours.double() - theirs.double()).norm() < 2**-7 * theirs.double().norm()


def test_a_large_low_precision_head_is_converted_in_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40_000, 4, generator=draw).bfloat16().requires_grad_()
    hidden = torch.randn(5, 4, generator=draw).bfloat16().requires_grad_()
    labels = torch.tensor([0, 16_383, 16_384, 39_999, 7])
    loss, _ = fused_head_loss(weight, [HeadLossTask(hidden, labels)])
    reference = nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(each, [hidden, weight]) for each in (loss, reference))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-5)


def test_rows_of_the_head_beyond_the_vocabulary_are_ignored() -> None:
    case = Case(5, LossSpec())
    with torch.no_grad():
        case.weight[V:] = 1e6
    _, of_weight, of_bias = case.gradients(case.fused())
    assert not of_weight[V:].any()
    assert not of_bias[V:].any()
    assert of_weight[:V].any()


@pytest.mark.parametrize("frozen", list(product([True, False], repeat=3)))
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: tuple[bool, ...]) -> None:
    case = Case(5, LossSpec())
    expected = case.gradients(case.fused())
    inputs = [case.hidden, case.weight, case.bias]
    for each, is_frozen in zip(inputs, frozen, strict=True):
        each.requires_grad_(not is_frozen)
    loss = case.fused()
    assert loss.requires_grad == (not all(frozen))
    if loss.requires_grad:
        (1.7 * loss).backward()
    for each, is_frozen, gradient in zip(inputs, frozen, expected, strict=True):
        if is_frozen:
            assert each.grad is None
        else:
            assert each.grad is not None
            torch.testing.assert_close(each.grad, gradient)


def test_without_a_gradient_nothing_is_kept_for_one() -> None:
    case = Case(5, LossSpec())
    with torch.no_grad():
        loss = case.fused()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, case.fused().detach())


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    def run(fused: bool) -> Tensor:
        embedding = nn.Embedding(V, D, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(torch.from_numpy(np.random.default_rng(1).normal(size=(V, D))))
        hidden, labels = embedding(torch.tensor([3, 5, 3])).tanh(), torch.tensor([5, 3, 39])
        if fused:
            loss = fused_head_loss(embedding.weight, [HeadLossTask(hidden, labels)])[0]
        else:
            loss = nn.functional.cross_entropy(hidden @ embedding.weight.T, labels, reduction="sum")
        loss.backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(run(True), run(False))


def test_tasks_share_a_head_and_keep_their_sums() -> None:
    one, two = Case(5, LossSpec(), seed=1), Case(3, LossSpec("jsd", "exact"), seed=2)
    exact = HeadLossTask(two.hidden, None, two.teacher_rows(), two.loss_spec(), weight=2.0)
    tasks = [one.task(), exact, HeadLossTask(one.hidden, one.labels)]
    loss, sums = fused_head_loss(one.weight, tasks, vocab_size=V, chunk_logits=2 * V)
    alone = [fused_head_loss(one.weight, [task], vocab_size=V) for task in tasks]
    torch.testing.assert_close(loss, alone[0][0] + alone[1][0] + alone[2][0])
    for together, (_, (single,)) in zip(sums, alone, strict=True):
        torch.testing.assert_close(together.cross_entropy, single.cross_entropy)
        torch.testing.assert_close(together.divergence, single.divergence)
    assert not sums[0].divergence.requires_grad
    assert sums[1].cross_entropy == sums[2].divergence == 0
    torch.testing.assert_close(
        loss, 0.7 * sums[0].cross_entropy + 0.3 * sums[0].divergence + 2 * sums[1].divergence + sums[2].cross_entropy
    )
    gradient = torch.autograd.grad(loss, one.weight)[0]
    torch.testing.assert_close(gradient, sum(torch.autograd.grad(each, one.weight)[0] for each, _ in alone))


def test_no_rows_give_zero_attached_to_the_graph() -> None:
    case = Case(0, LossSpec())
    for tasks in ([case.task()], []):
        loss, _ = fused_head_loss(case.weight, tasks, vocab_size=V)
        (gradient,) = torch.autograd.grad(loss, case.weight)
        assert loss.item() == 0
        assert not gradient.any()


def test_a_second_backward_pass_is_refused() -> None:
    case = Case(2, LossSpec())
    loss = case.fused()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by an earlier backward pass"):
        loss.backward()


def test_the_teacher_s_head_gives_the_cache_s_logits() -> None:
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(4, 9)).astype(np.float32)
    stored = make_head(
        torch.randn(V, 9, generator=torch.Generator().manual_seed(1)).bfloat16().float().numpy(),
        draw.normal(size=V).astype(np.float32), scale=0.5, soft_cap=3.0,
    )  # fmt: skip
    weight = torch.from_numpy(stored.weight).view(torch.bfloat16)
    assert stored.bias is not None
    head = TeacherHead(weight, torch.from_numpy(stored.bias), stored.scale, stored.soft_cap)
    logits = head.compute_logits(torch.from_numpy(hidden), dtype=torch.float32)
    torch.testing.assert_close(logits, torch.from_numpy(stored.logits(hidden)))
