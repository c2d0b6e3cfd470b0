from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from storage.records.sparse_rows import SparseRows
from student_train.data.collate import make_teacher_rows
from student_train.losses.config import TREATMENTS, Divergence, Treatment
from student_train.losses.sparse_divergence import (
    LossSpec,
    TailProfile,
    TeacherRows,
    differentiate_rows_,
    measure_rows_,
)
from tests.hypothesis_profiles import examples
from tests.student_train.caches import log_softmax, sparse_rows
from tests.student_train.references import dense_loss, sparse_loss

SPARSE: list[tuple[Divergence, Treatment]] = [
    (d, t) for d, treatments in TREATMENTS.items() for t in treatments if t != "exact"
]
BIASED = ("truncate", "renormalise")


def logits(rows: int, vocab: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab))


def log_sum_exps(teacher: np.ndarray, temperature: float) -> np.ndarray:
    """Compute the log-sum-exp of log p / T, as a cache stores it."""
    return np.log(np.exp(log_softmax(teacher) / temperature).sum(1)).astype(np.float32)


def at_temperature(stored: SparseRows, teacher: np.ndarray, temperature: float) -> TeacherRows:
    return make_teacher_rows(replace(stored, log_sum_exp=log_sum_exps(teacher, temperature)[:, None]))


def compute(
    rows: TeacherRows | None,
    values: np.ndarray | Tensor,
    spec: LossSpec,
    *,
    profile: np.ndarray | None = None,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of cross-entropy and divergence, and the gradient of their weighted sum, in float64."""
    spec = replace(spec, column=0)
    if spec.treatment == "profile":
        assert profile is not None
        shape = TailProfile.from_mass(torch.from_numpy(profile), temperature=spec.temperature, dtype=dtype)
        spec = replace(spec, profile=shape)
    z = torch.as_tensor(values).to(dtype).clone()
    sums = differentiate_rows_(z, labels, rows, spec)
    return sums.cross_entropy.double(), sums.divergence.double(), z.double()


def assert_same(found: tuple[Tensor, Tensor, Tensor], reference: Tensor, values: Tensor, tolerance: float) -> None:
    """Check that the divergence and its gradient agree with the reference."""
    (expected,) = torch.autograd.grad(reference, values)
    torch.testing.assert_close(found[1], reference.detach().double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2], expected.double(), rtol=tolerance, atol=tolerance)


def student(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def tail_profile(vocab: int, seed: int) -> np.ndarray:
    """Make a tail profile, with tokens of mass 0."""
    profile = np.random.default_rng(seed).gamma(0.3, size=vocab)
    profile[::5] = 0
    return profile / max(profile.sum(), 1e-9)


@pytest.mark.parametrize(("divergence", "treatment"), SPARSE)
@settings(max_examples=examples(12))
@given(
    rows=st.integers(1, 5), vocab=st.integers(2, 40), k=st.integers(0, 40), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([1.0, 0.5, 3.0]), beta=st.sampled_from([None, 0.3, 0.9]), sharp=st.booleans(),
)  # fmt: skip
# The stored entries, rounded to float32, sum to more than 1 at this temperature: no mass is left, not a negative one.
@example(rows=1, vocab=37, k=35, seed=1145, temperature=0.5, beta=None, sharp=False)
def test_every_treatment_agrees_with_the_slow_reference(
    divergence: Divergence, treatment: Treatment, rows: int, vocab: int, k: int, seed: int,
    temperature: float, beta: float | None, sharp: bool,
) -> None:  # fmt: skip
    teacher, values = logits(rows, vocab, seed, 6.0 if sharp else 2.0), logits(rows, vocab, seed + 1)
    sampled = treatment == "unbiased"
    temperature = 1.0 if sampled else temperature
    stored = sparse_rows(teacher, tau=0.04, seed=seed) if sampled else sparse_rows(teacher, k=min(k, vocab))
    if treatment == "renormalise" and k == 0:
        stored = sparse_rows(teacher, k=1)
    spec = LossSpec(divergence, treatment, temperature, beta if divergence in ("jsd", "skewed_kl") else None)
    profile = tail_profile(vocab, seed)
    found = compute(at_temperature(stored, teacher, temperature), values, spec, profile=profile, dtype=torch.float64)
    reference = student(values)
    expected = sparse_loss(stored, log_sum_exps(teacher, temperature), reference, spec, profile)
    # Sums of a few float32 probabilities that a logarithm is taken of: a tail that is 1 minus them has their error.
    tolerance = 1e-7 if temperature == 1 and not sampled else 2e-5
    assert_same(found, expected, reference, max(tolerance, 1e-6 if treatment == "profile" else 0))


@pytest.mark.parametrize(("divergence", "treatment"), SPARSE)
@settings(max_examples=examples(8))
@given(rows=st.integers(1, 5), vocab=st.integers(2, 40), seed=st.integers(0, 10**6))
def test_with_every_entry_stored_it_is_the_dense_divergence(
    divergence: Divergence, treatment: Treatment, rows: int, vocab: int, seed: int
) -> None:
    for temperature in (1.0,) if treatment == "unbiased" else (1.0, 2.5):
        teacher, values = logits(rows, vocab, seed), logits(rows, vocab, seed + 1)
        spec = LossSpec(divergence, treatment, temperature)
        stored = at_temperature(sparse_rows(teacher, k=vocab), teacher, temperature)
        found = compute(stored, values, spec, profile=tail_profile(vocab, seed))
        reference = student(values)
        assert_same(found, dense_loss(teacher, reference, spec), reference, 1e-5)


@pytest.mark.parametrize("divergence", TREATMENTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_rows_of_the_teacher_give_the_dense_divergence(divergence: Divergence, temperature: float) -> None:
    teacher, values = logits(7, 33, 0), logits(7, 33, 1)
    spec = LossSpec(divergence, "exact", temperature)
    z = torch.tensor(values)
    sums = differentiate_rows_(z, None, torch.tensor(teacher), spec)
    reference = student(values)
    assert_same((sums.cross_entropy, sums.divergence, z), dense_loss(teacher, reference, spec), reference, 1e-9)


@pytest.mark.parametrize("divergence", [d for d in TREATMENTS if d != "cross_entropy"])
@settings(max_examples=examples(10))
@given(vocab=st.integers(2, 40), k=st.integers(0, 39), seed=st.integers(0, 10**6))
def test_the_bucket_is_a_lower_bound_of_the_dense_divergence(
    divergence: Divergence, vocab: int, k: int, seed: int
) -> None:
    teacher, values = logits(3, vocab, seed), logits(3, vocab, seed + 1)
    spec = LossSpec(divergence)
    _, bucketed, _ = compute(make_teacher_rows(sparse_rows(teacher, k=min(k, vocab))), values, spec)
    assert -1e-5 <= bucketed.item() <= dense_loss(teacher, torch.tensor(values), spec).item() + 1e-5


@pytest.mark.parametrize("divergence", [d for d in TREATMENTS if d != "cross_entropy"])
@pytest.mark.parametrize("k", [0, 1, 7, 30])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_of_a_distribution_from_itself_is_zero(divergence: Divergence, k: int, temperature: float) -> None:
    teacher = logits(6, 30, 0)
    rows = at_temperature(sparse_rows(teacher, k=k), teacher, temperature)
    _, loss, gradient = compute(rows, teacher, LossSpec(divergence, "bucket", temperature))
    assert abs(loss.item()) < 2e-5  # the tail mass is a float32 and weighs up to 5 nats, in 6 rows
    assert gradient.abs().max().item() < 1e-5 if divergence != "total_variation" else 1
    z = torch.tensor(teacher, dtype=torch.float32)
    exact = differentiate_rows_(z, None, z.clone(), LossSpec(divergence, "exact", temperature))
    assert abs(exact.divergence.item()) < 2e-6


def test_the_bucket_by_hand() -> None:
    teacher = np.log(np.array([[0.5, 0.3, 0.2]]))
    uniform = np.zeros((1, 3))
    one = 0.5 * np.log(0.5 / (1 / 3)) + 0.5 * np.log(0.5 / (2 / 3))
    two = 0.5 * np.log(1.5) + 0.3 * np.log(0.9) + 0.2 * np.log(0.6)
    for k, expected in ((1, one), (2, two)):
        loss = compute(make_teacher_rows(sparse_rows(teacher, k=k)), uniform, LossSpec())[1]
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_profile_by_hand() -> None:
    """One entry of 0.5 is stored; the profile splits the other half 1 : 3 among the tokens that are not."""
    teacher = np.log(np.array([[0.5, 0.3, 0.2]]))
    profile = np.array([0.6, 0.1, 0.3]) - 1e-3 / 3
    profile /= profile.sum()
    expected = 0.5 * np.log(0.5 * 3) + 0.125 * np.log(0.125 * 3) + 0.375 * np.log(0.375 * 3)
    rows = make_teacher_rows(sparse_rows(teacher, k=1))
    _, loss, gradient = compute(rows, np.zeros((1, 3)), LossSpec(treatment="profile"), profile=profile)
    assert loss.item() == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(gradient[0], np.array([1 / 3 - 0.5, 1 / 3 - 0.125, 1 / 3 - 0.375]), atol=1e-3)


@pytest.mark.parametrize("divergence", TREATMENTS)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_outside", [1, 55])
def test_a_profile_concentrated_on_stored_tokens_keeps_float32_precision(
    divergence: Divergence, temperature: float, num_outside: int
) -> None:
    """Other tokens have only the profile's floor, which is lost in 1 minus the stored mass in float32."""
    vocab = 60
    teacher, values = logits(3, vocab, 4, scale=0.5), logits(3, vocab, 5)
    stored = sparse_rows(teacher, k=vocab - num_outside)
    profile = np.zeros(vocab)
    profile[np.bincount(stored.ids).argmax()] = 1.0  # a token that most rows have stored
    spec = LossSpec(divergence, "profile", temperature)
    found = compute(at_temperature(stored, teacher, temperature), values, spec, profile=profile)
    reference = student(values)
    expected = sparse_loss(stored, log_sum_exps(teacher, temperature), reference, spec, profile)
    assert_same(found, expected, reference, 1e-4)


def test_the_bucket_ignores_sampled_entries() -> None:
    teacher, values = logits(4, 50, 1, scale=1.0), logits(4, 50, 2)
    sampled = sparse_rows(teacher, tau=0.05)
    counts = [int((np.exp(row) >= 0.05).sum()) for row in log_softmax(teacher)]
    assert sampled.num_exact.tolist() == counts
    assert sampled.num_entries > sum(counts)
    reference = student(values)
    expected = sparse_loss(sampled, np.zeros(4), reference, LossSpec())
    assert_same(compute(make_teacher_rows(sampled), values, LossSpec()), expected, reference, 1e-5)


def test_unbiased_kl_averages_to_the_dense_kl_and_its_gradient() -> None:
    teacher, values = logits(2, 60, 3, scale=1.5), logits(2, 60, 4)
    losses, gradients = [], []
    for seed in range(600):
        rows = make_teacher_rows(sparse_rows(teacher, tau=0.08, seed=seed))
        _, loss, gradient = compute(rows, values, LossSpec(treatment="unbiased"))
        losses.append(loss.item())
        gradients.append(gradient)
    reference = student(values)
    dense = dense_loss(teacher, reference, LossSpec())
    (expected,) = torch.autograd.grad(dense, reference)
    standard_error = np.std(losses) / np.sqrt(len(losses))
    assert abs(np.mean(losses) - dense.item()) < 4 * standard_error
    stacked = torch.stack(gradients)
    errors = (stacked.mean(0) - expected).abs() / (stacked.std(0) / np.sqrt(len(losses)) + 1e-4)
    assert float(errors.max()) < 5


@pytest.mark.parametrize("divergence", TREATMENTS)
@pytest.mark.parametrize("gap", [30.0, 90.0, 1000.0])
def test_a_student_without_mass_outside_the_stored_set_gives_finite_values(divergence: Divergence, gap: float) -> None:
    rows = make_teacher_rows(sparse_rows(logits(1, 20, 5), k=2))
    values = torch.zeros(1, 20)
    values[0, rows.ids[:1]] = gap
    _, loss, gradient = compute(rows, values, LossSpec(divergence))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    reference = values.double().requires_grad_()
    stored = sparse_rows(logits(1, 20, 5), k=2)
    if gap < 700:  # where float64 still has a probability for it
        assert_same(
            (loss, loss, gradient), sparse_loss(stored, np.zeros(1), reference, LossSpec(divergence)), reference, 1e-5
        )
    elif divergence == "forward_kl":  # all of the rest is 1000 below the top
        p = np.exp(stored.logprobs.astype(np.float64))
        expected = (p * np.log(p)).sum() + (1 - p.sum()) * np.log(1 - p.sum()) + 1000 * (1 - p[0])
        assert loss.item() == pytest.approx(expected - (1 - p.sum()) * np.log(18), rel=1e-5)


@pytest.mark.parametrize(("divergence", "treatment"), SPARSE)
def test_rows_whose_mass_rounds_to_1(divergence: Divergence, treatment: Treatment) -> None:
    """The first row is almost certain; stored entries of the second sum to 1 in float32, of the third to more."""
    teacher = logits(3, 20, 6)
    teacher[0, 4] = 60.0
    stored = sparse_rows(teacher, k=4)
    head = np.exp(stored.logprobs.reshape(3, 4).astype(np.float64))
    head /= head.sum(1, keepdims=True)
    head[2, 0] += 5e-7
    whole = replace(stored, tail_mass=np.zeros(3, np.float32), logprobs=np.log(head).ravel().astype(np.float32))
    values, spec, profile = logits(3, 20, 7), LossSpec(divergence, treatment), tail_profile(20, 3)
    reference = student(values)
    expected = sparse_loss(whole, np.zeros(3), reference, spec, profile)
    assert torch.isfinite(expected)
    assert_same(compute(make_teacher_rows(whole), values, spec, profile=profile), expected, reference, 2e-5)


@pytest.mark.parametrize(("divergence", "treatment"), [*SPARSE, ("jsd", "exact")])
def test_labels_add_their_cross_entropy(divergence: Divergence, treatment: Treatment) -> None:
    """For labels that are stored and not, at temperature 1 (one softmax) and others (two)."""
    teacher, values = logits(5, 30, 11), logits(5, 30, 12)
    labels = torch.tensor([int(teacher[0].argmax()), 3, 29, 3, int(teacher[4].argmin())])
    profile = tail_profile(30, 1)
    for temperature in (1.0,) if treatment == "unbiased" else (1.0, 2.0):
        stored = at_temperature(sparse_rows(teacher, k=6), teacher, temperature)
        z, alone = torch.tensor(values), torch.tensor(values)
        shape = TailProfile.from_mass(torch.from_numpy(profile), temperature=temperature, dtype=torch.float64)
        spec = LossSpec(divergence, treatment, temperature, column=0, profile=shape)
        target = torch.tensor(teacher) if treatment == "exact" else stored
        both = differentiate_rows_(z, labels, target, spec, label_weight=0.7, weight=0.3)
        one = differentiate_rows_(alone, None, target, spec, weight=0.3)
        reference = student(values)
        expected = torch.nn.functional.cross_entropy(reference, labels, reduction="sum")
        (slope,) = torch.autograd.grad(expected, reference)
        torch.testing.assert_close(both.cross_entropy, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.divergence, one.divergence, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(z, alone + 0.7 * slope, rtol=1e-9, atol=1e-12)


def test_blocks_of_rows_change_nothing() -> None:
    """A vocabulary so large that rows are computed in several blocks."""
    teacher, values = logits(7, 300_000, 1), logits(7, 300_000, 2)
    rows, labels = make_teacher_rows(sparse_rows(teacher, k=5)), torch.arange(7)
    for treatment in ("bucket", "profile"):
        profile = tail_profile(300_000, 0)
        spec = LossSpec(treatment=treatment)
        together = compute(rows, values, spec, labels=labels, profile=profile, dtype=torch.float64)
        single = [
            compute(rows[n : n + 1], values[n : n + 1], spec, labels=labels[n : n + 1], profile=profile,
                    dtype=torch.float64)
            for n in range(7)
        ]  # fmt: skip
        for part in (0, 1):
            torch.testing.assert_close(together[part], torch.stack([one[part] for one in single]).sum())
        torch.testing.assert_close(together[2], torch.cat([one[2] for one in single]))


def test_a_nan_logit_gives_a_nan_loss() -> None:
    rows = make_teacher_rows(sparse_rows(logits(2, 20, 5), k=2))
    for divergence, treatment in SPARSE:
        for place, value in product((int(rows.ids[0]), (int(rows.ids[0]) + 1) % 20), (torch.nan, torch.inf)):
            values = torch.zeros(2, 20)
            values[0, place] = value
            loss = compute(rows, values, LossSpec(divergence, treatment), profile=tail_profile(20, 0))[1]
            assert not torch.isfinite(loss), (divergence, treatment, place, value)


def test_no_rows_give_zero() -> None:
    empty = make_teacher_rows(SparseRows.empty())
    for divergence, treatment in SPARSE:
        for labels in (None, torch.zeros(0, dtype=torch.int64)):
            found = compute(
                empty, np.zeros((0, 7)), LossSpec(divergence, treatment), labels=labels, profile=tail_profile(7, 0)
            )
            assert [found[0].item(), found[1].item(), found[2].numel()] == [0, 0, 0]


def test_teacher_rows_slice_like_sparse_rows() -> None:
    stored = sparse_rows(logits(6, 30, 11), tau=0.06)
    rows = make_teacher_rows(stored)
    part, expected = rows[2:5], make_teacher_rows(stored.slice(2, 5))
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(part, name), value, rtol=0, atol=0)
    assert rows.row_of_entry().tolist() == stored.row_of_entry().tolist()
    assert rows.is_exact().tolist() == stored.is_exact().tolist()


def test_selected_teacher_rows_equal_slices() -> None:
    rows = make_teacher_rows(sparse_rows(np.random.default_rng(3).normal(size=(6, 30)), tau=0.05, temperatures=(2.0,)))
    for chosen in ([4, 0, 0, 5], [2], []):
        taken = rows[torch.tensor(chosen, dtype=torch.int64)]
        assert taken.num_rows == len(chosen)
        for place, row in enumerate(chosen):
            found, expected = taken[place : place + 1], rows[row : row + 1]
            for name, value in vars(expected).items():
                assert torch.equal(getattr(found, name), value), name


@pytest.mark.parametrize("k", [5, 40])
def test_each_row_is_measured_as_the_sums_are(k: int) -> None:
    values, teacher, labels = logits(7, 40, 1), logits(7, 40, 2), torch.arange(7)
    rows = make_teacher_rows(sparse_rows(teacher, k=k))
    surprises, divergences = measure_rows_(torch.from_numpy(values).float(), labels, rows)
    assert surprises.shape == divergences.shape == (7,)
    for row in range(7):
        sums = differentiate_rows_(
            torch.from_numpy(values[row : row + 1]).float(), labels[row : row + 1], rows[row : row + 1]
        )
        torch.testing.assert_close((surprises[row], divergences[row]), (sums.cross_entropy, sums.divergence))
    nothing = measure_rows_(torch.zeros(0, 40), labels[:0], rows[:0])
    assert [each.shape for each in nothing] == [(0,), (0,)]
