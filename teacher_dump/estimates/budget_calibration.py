"""Scores a slice of a plan with a loaded teacher, and chooses the settings that meet a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from storage.config import BudgetSection
from storage.encoding.part_encoder import PartEncoder
from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.data.sample import Sample
from teacher_dump.estimates.fidelity_budget import MAX_ROWS, BudgetChoice, TeacherRows, choose_setting
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.signals.states import select_new_images, select_response_states

T = TypeVar("T")

_SAMPLES_PER_CALL = 32


@dataclass(frozen=True)
class BudgetTask:
    """A budget, the samples to measure it on, and the dump's encoder of the families that need settings."""

    samples: tuple[Sample, ...]
    budget: BudgetSection
    encoder: PartEncoder
    samples_per_part: int


def pick_evenly(samples: Sequence[T], count: int) -> tuple[T, ...]:
    """Returns at most `count` of the samples, or of their positions, evenly spread."""
    count = min(count, len(samples))
    return tuple(samples[number * len(samples) // count] for number in range(count))


def choose_settings(scorer: PartScorer, task: BudgetTask) -> dict[str, BudgetChoice]:
    """Returns the choice for each family.

    Raises ConfigError as `choose_setting`, and StillhouseError if no sample can be scored.
    """
    states: dict[str, list[Tensor]] = {family: [] for family in task.encoder.families}
    errors: list[SampleError] = []
    known: set[str] = set()
    num_scored = 0
    for start in range(0, len(task.samples), _SAMPLES_PER_CALL):
        chunk = scorer.prepare(task.samples[start : start + _SAMPLES_PER_CALL])
        answers = scorer.hidden_states(chunk.ready)
        errors += (*chunk.errors, *answers.errors)
        scored = [(one, own) for one, own in answers.accepted if bool(torch.isfinite(own).all())]
        num_scored += len(scored)
        if "response" in states:
            states["response"] += [select_response_states(one, own) for one, own in scored]
        if "visual" in states:
            new = select_new_images(scored, known)
            known |= new.keys()
            states["visual"] += [own.float() for own in new.values()]
    found = {}
    for family in task.encoder.families:
        whole = sum(map(len, states[family]))
        rows_of_samples = _limit_rows(states[family])
        if scorer.teacher is None or not rows_of_samples:
            why = errors[0].reason if errors else "they have no such rows"
            raise StillhouseError(f"cache.budget: no {family} rows of {len(task.samples)} samples can be scored: {why}")
        rows = TeacherRows(
            head=scorer.teacher.head,
            hidden=torch.cat(rows_of_samples).to(scorer.teacher.head.weight.device),
            sizes=tuple(map(len, rows_of_samples)),
            family=family,
            encoder=task.encoder,
            rows_per_part=max(1, round(whole / num_scored * task.samples_per_part)),
        )
        found[family] = choose_setting(rows, task.budget)
    return found


def _limit_rows(states: Sequence[Tensor]) -> list[Tensor]:
    """Returns whole samples, evenly spread, with at most MAX_ROWS rows in all; at least one sample."""
    there = [own for own in states if len(own)]
    kept = max(1, int(len(there) * min(1.0, MAX_ROWS / max(sum(map(len, there)), 1))))
    return [there[number * len(there) // kept] for number in range(kept)] if there else []
