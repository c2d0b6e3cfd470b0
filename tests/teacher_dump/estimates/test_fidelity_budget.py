"""The fidelity budget: its predictions equal the measured error and size, and impossible budgets are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from storage.config import BudgetSection
from storage.encoding.part_encoder import PartEncoder
from storage.errors import ConfigError, IdentityError
from storage.selection import Threshold
from storage.writer.cache_writer import CacheWriter
from teacher_dump.estimates.budget_calibration import BudgetTask, choose_settings, pick_evenly
from teacher_dump.estimates.budget_choice import apply_budget
from teacher_dump.estimates.fidelity_budget import STUDENT_KL, TeacherRows, _BudgetTrial, choose_setting
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.sparsify import select_rows
from teacher_dump.workers.worker import open_scorer
from tests.storage.synthetic_cache import make_identity
from tests.teacher_dump.conftest import WriteConfig


def make_rows(
    num_samples: int = 24, size: int = 20, *, vocab: int = 400, width: int = 24, seed: int = 0
) -> TeacherRows:
    generator = torch.Generator().manual_seed(seed)
    head = OutputHead(torch.randn(vocab, width, generator=generator) * 0.7)
    hidden = torch.randn(num_samples * size, width, generator=generator)
    return TeacherRows(
        head=head,
        hidden=hidden,
        sizes=(size,) * num_samples,
        family="response",
        encoder=PartEncoder(make_identity(vocab_size=vocab), ("response",)),
        rows_per_part=num_samples * size,
    )


def test_the_prediction_is_the_error_of_real_draws() -> None:
    """Over as many rows as were tried, root mean square over 40 seeds, without rounding."""
    rows = make_rows()
    trial = _BudgetTrial(rows, len(rows.hidden))
    choice = trial.evaluate(0.05, 1.25e-4)
    student = trial._student.double()
    logits = rows.head.logits(rows.hidden)
    p, q = logits.double().softmax(dim=1), rows.head.logits(trial._student).double().softmax(dim=1)
    assert float((p * (p.log() - q.log())).sum(dim=1).mean()) == pytest.approx(STUDENT_KL, rel=0.15)
    signal = float(((q - p).T @ student).norm())
    assert trial._gradient_norm == pytest.approx(signal**2, rel=1e-3)
    squares = []
    for seed in range(40):
        uniforms = np.random.default_rng(seed).random(len(logits))
        stored = select_rows(logits, labels=None, selection=Threshold(0.05), uniforms=uniforms)
        dense = torch.zeros_like(p)
        dense[torch.from_numpy(stored.row_of_entry()), torch.from_numpy(stored.ids.astype(np.int64))] = (
            torch.from_numpy(np.exp(stored.logprobs.astype(np.float64)))
        )
        squares.append(float(((dense - p).T @ student).norm()) ** 2)
    assert choice.gradient_error == pytest.approx(np.sqrt(np.mean(squares)) / signal, rel=0.12)


def test_more_rows_make_the_error_smaller_and_no_more_than_their_root() -> None:
    rows = make_rows()
    few, many = (_BudgetTrial(rows, count).evaluate(0.05, 5e-4).gradient_error for count in (480, 4 * 480))
    assert few / 2.1 < many < few


@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_a_gradient_error_is_kept_with_as_few_bytes_as_can_be(limit: float) -> None:
    rows = make_rows()
    budget = BudgetSection(gradient_error=limit, rows=2000)
    choice = choose_setting(rows, budget)
    assert choice.gradient_error <= limit
    assert choice == choose_setting(rows, budget)
    trial = _BudgetTrial(rows, 2000)
    coarser = trial.evaluate(choice.tau * 2 ** (1 / 4), choice.rounding_kl)
    assert coarser.gradient_error > limit or coarser.bytes_per_row >= choice.bytes_per_row
    assert choice.rows == 2000
    assert choice.calibration_rows == 480


def test_bytes_a_row_are_kept_and_spent_on_fidelity() -> None:
    rows = make_rows()
    roomy, tight = (choose_setting(rows, BudgetSection(bytes_per_row=limit)) for limit in (45, 30))
    assert roomy.bytes_per_row <= 45
    assert tight.bytes_per_row <= 30
    assert roomy.gradient_error < tight.gradient_error


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        (
            BudgetSection(gradient_error=1e-6),
            r"gradient_error: 1e-06 cannot be met for response rows; the nearest is tau",
        ),
        (BudgetSection(bytes_per_row=0.5), r"bytes_per_row: 0\.5 cannot be met .* at \d+(\.\d+)? bytes a row"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest_numbers(budget: BudgetSection, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        choose_setting(make_rows(), budget)


def test_bytes_are_predicted_for_the_rows_of_a_part() -> None:
    few = make_rows(8)
    predicted = _BudgetTrial(replace(few, rows_per_part=640), 8192).evaluate(0.05, 5e-4).bytes_per_row
    real = _BudgetTrial(make_rows(32), 8192).evaluate(0.05, 5e-4).bytes_per_row
    assert predicted == pytest.approx(real, rel=0.1)


def test_the_choice_on_a_scored_slice_meets_the_budget(write_config: WriteConfig) -> None:
    fields = {"families": ["response", "visual"], "budget": {"gradient_error": 0.3, "families": ["response", "visual"]}}
    settings = read_settings(write_config(cache=fields))
    planned, budget = plan_dump(settings), settings.cache.budget
    assert budget is not None
    samples = pick_evenly([sample for part in planned.plan.parts for sample in part.samples], 6)
    assert len(samples) == 6
    task = BudgetTask(samples, budget, PartEncoder(planned.identity, ("response", "visual")), samples_per_part=4)
    chosen = choose_settings(open_scorer(make_worker_settings(planned, settings)), task)
    assert set(chosen) == {"response", "visual"}
    assert all(choice.gradient_error <= 0.3 for choice in chosen.values())
    assert all(choice.calibration_rows > 6 for choice in chosen.values())


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        ({"budget": {}}, "give either gradient_error or bytes_per_row"),
        ({"budget": {"gradient_error": 0.1, "bytes_per_row": 3}}, "give either gradient_error or"),
        ({"budget": {"bytes_per_row": 30}, "families": ["relation"]}, "budget.families names response"),
        ({"budget": {"bytes_per_row": 30}, "response": {"method": "topk"}}, "with method 'threshold'"),
    ],
)
def test_invalid_budgets_are_refused(write_config: WriteConfig, cache: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_settings(write_config(cache=cache))


def test_a_budget_other_than_the_caches_is_refused_by_name(write_config: WriteConfig) -> None:
    settings = read_settings(write_config(cache={"budget": {"gradient_error": 0.3}, "families": ["response"]}))
    planned = plan_dump(settings)
    assert settings.cache.budget is not None
    recorded = {"gradient_error": 0.3, "rows": 8192, "samples": 64, "predicted": {"distance": 0.1}}
    chosen = {**planned.identity.selection["response"], "tau": 0.05, "rounding_kl": 0.002, "budget": recorded}
    CacheWriter.open(
        settings.cache.path, planned.identity.model_copy(update={"selection": {"response": chosen}}), ("response",)
    )
    same = plan_dump(settings)
    assert apply_budget(same, settings) is same  # no teacher is asked again
    asked = settings.cache.budget.model_copy(update={"gradient_error": 0.2})
    other = replace(settings, cache=settings.cache.model_copy(update={"budget": asked}))
    with pytest.raises(IdentityError, match=r"budget\.gradient_error: cache has 0\.3, this run has 0\.2") as refusal:
        apply_budget(plan_dump(other), other)
    assert "tau" not in str(refusal.value)
