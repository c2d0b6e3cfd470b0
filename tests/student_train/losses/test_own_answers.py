"""Reverse KL and JSD on rows of the student's own answers: stored rows against dense ones, in float64.

On its own answers a student is sure of tokens that the teacher may find improbable, and that are not stored. Rows are
selected by the dump's own code, with every method whose rows these divergences accept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.records.sparse_rows import SparseRows
from storage.selection import Mass, Selection, Threshold, TopK
from student_train.data.collate import make_teacher_rows
from student_train.losses.config import TREATMENTS, Divergence, Treatment
from student_train.losses.sparse_divergence import LossSpec, TailProfile, differentiate_rows_
from teacher_dump.signals.sparsify import make_row_uniforms, select_rows
from tests.student_train.references import dense_loss, sparse_loss

VOCAB, ROWS, TEMPERATURE = 48, 24, 2.0
WHOLE: list[Selection] = [TopK(k=VOCAB), Threshold(tau=1e-5), Mass(mass=1 - 1e-5)]  # every token is stored exactly
PARTIAL: list[Selection] = [TopK(k=5), Threshold(tau=0.05), Mass(mass=0.8)]
LOSSES: list[tuple[Divergence, float | None]] = [("reverse_kl", None), ("jsd", None), ("jsd", 0.1), ("jsd", 0.9)]


def make_own_answers(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a moderate teacher and a sure student, (r, v) each, and the tokens that the student generated, (r,).

    Half of the rows agree on the first token; on the others the student is sure of a token that the teacher ranks low.
    """
    draw = np.random.default_rng(seed)
    teacher = draw.normal(0, 1.2, (ROWS, VOCAB)).astype(np.float32)
    student = 0.5 * teacher.astype(np.float64) + draw.normal(0, 1, (ROWS, VOCAB))
    favourite = np.where(np.arange(ROWS) % 2 == 0, teacher.argmax(1), teacher.argmin(1))
    student[np.arange(ROWS), favourite] += 6.0
    probabilities = torch.from_numpy(student).softmax(1)
    tokens = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0].numpy()
    return teacher, student, tokens


def select(teacher: np.ndarray, tokens: np.ndarray, selection: Selection) -> SparseRows:
    uniforms = make_row_uniforms(len(teacher), seed=0, family="response", key="one")
    labels = torch.from_numpy(tokens)
    logits = torch.from_numpy(teacher.copy())
    return select_rows(logits, labels=labels, selection=selection, uniforms=uniforms, temperatures=(TEMPERATURE,))


def compute(rows: SparseRows, student: np.ndarray, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, in float64."""
    z = torch.from_numpy(student).clone()
    sums = differentiate_rows_(z, None, make_teacher_rows(rows), replace(spec, column=0))
    return sums.divergence, z


def differentiate(reference: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(reference, values)
    return reference.detach(), gradient


def make_leaf(student: np.ndarray) -> Tensor:
    return torch.tensor(student, dtype=torch.float64, requires_grad=True)


def log_sum_exps(teacher: np.ndarray, temperature: float) -> np.ndarray:
    logprobs = torch.from_numpy(teacher).double().log_softmax(1)
    return (logprobs / temperature).logsumexp(1).numpy()


def treatments(divergence: Divergence) -> list[Treatment]:
    return [treatment for treatment in TREATMENTS[divergence] if treatment != "exact"]


def make_profile() -> np.ndarray:
    profile = np.random.default_rng(5).gamma(0.5, size=VOCAB)
    return profile / profile.sum()


def make_spec(divergence: Divergence, treatment: Treatment, temperature: float, beta: float | None) -> LossSpec:
    shape = None
    if treatment == "profile":
        shape = TailProfile.from_mass(torch.from_numpy(make_profile()), temperature=temperature, dtype=torch.float64)
    return LossSpec(divergence, treatment, temperature, beta, profile=shape)


@pytest.mark.parametrize(("divergence", "beta"), LOSSES)
@pytest.mark.parametrize("selection", WHOLE, ids=lambda one: one.name)
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_whole_rows_of_own_answers_give_the_dense_divergence(
    divergence: Divergence, beta: float | None, selection: Selection, temperature: float
) -> None:
    teacher, student, tokens = make_own_answers()
    rows = select(teacher, tokens, selection)
    assert rows.num_exact.tolist() == [VOCAB] * ROWS
    for treatment in treatments(divergence):
        spec = make_spec(divergence, treatment, temperature, beta)
        leaf = make_leaf(student)
        expected, gradient = differentiate(dense_loss(teacher, leaf, spec), leaf)
        assert expected > 0.1 * ROWS  # the two differ: the test would see a wrong loss
        found, ours = compute(rows, student, spec)
        # Stored logprobs are float32: 6e-8 relative, of values up to 10.
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("divergence", "beta"), LOSSES)
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_the_teachers_logits_give_the_dense_divergence(
    divergence: Divergence, beta: float | None, temperature: float
) -> None:
    """As treatment `exact` reads them, from hidden states."""
    teacher, student, _ = make_own_answers()
    spec = LossSpec(divergence, "exact", temperature, beta)
    leaf, z = make_leaf(student), torch.from_numpy(student).clone()
    expected, gradient = differentiate(dense_loss(teacher, leaf, spec), leaf)
    found = differentiate_rows_(z, None, torch.from_numpy(teacher).double(), spec).divergence
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(z, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("divergence", "beta"), LOSSES)
@pytest.mark.parametrize("selection", PARTIAL, ids=lambda one: one.name)
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_parts_of_rows_give_the_divergence_of_their_events(
    divergence: Divergence, beta: float | None, selection: Selection, temperature: float
) -> None:
    """Dense probabilities, summed over the events that the tail handling names, of the student's own tokens too."""
    teacher, student, tokens = make_own_answers()
    rows = select(teacher, tokens, selection)
    stored = [set(rows.ids[slice(*rows.offsets[row : row + 2])][: rows.num_exact[row]]) for row in range(ROWS)]
    assert sum(int(token) not in ids for token, ids in zip(tokens, stored, strict=True)) >= 4  # own tokens in the tail
    exact = log_sum_exps(teacher, temperature)
    for treatment in treatments(divergence):
        spec = make_spec(divergence, treatment, temperature, beta)
        leaf = make_leaf(student)
        expected, gradient = differentiate(sparse_loss(rows, exact, leaf, spec, make_profile()), leaf)
        found, ours = compute(rows, student, spec)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
        if treatment == "bucket":  # merging events lowers a divergence, and here it does so by much
            dense = float(dense_loss(teacher, make_leaf(student), spec).detach())
            assert 0 < float(found) < dense


def test_logprobs_of_own_tokens_average_to_the_reverse_kl() -> None:
    """What on-policy distillation samples, E over y ~ q of log q(y) - log p(y), summed here over every token y."""
    teacher, student, _ = make_own_answers()
    q = torch.from_numpy(student).log_softmax(1)
    total = torch.zeros(())
    for token in range(VOCAB):
        rows = select(teacher, np.full(ROWS, token), TopK(k=1))
        assert rows.label_logprob is not None
        of_token = q[:, token] - torch.from_numpy(rows.label_logprob).double()
        total = total + (q[:, token].exp() * of_token).sum()
    found, _ = compute(select(teacher, np.zeros(ROWS, np.int64), WHOLE[0]), student, LossSpec("reverse_kl", "bucket"))
    torch.testing.assert_close(found, total, rtol=1e-5, atol=0)
