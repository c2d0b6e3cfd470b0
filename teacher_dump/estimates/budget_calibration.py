"""The slice of a plan that a budget is measured on, scored beside an open teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from storage.config import BudgetSection, SelectionSection
from storage.errors import StillhouseError
from storage.records.records import SampleError
from teacher_dump.data.sample import Sample
from teacher_dump.estimates.fidelity_budget import MAX_ROWS, Choice, Rows, choose
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.signals.states import new_images, response_states

T = TypeVar("T")

_SAMPLES_PER_CALL = 32


@dataclass(frozen=True)
class Wanted:
    """What is to be chosen, and for what."""

    samples: tuple[Sample, ...]
    budget: BudgetSection
    sections: Mapping[str, SelectionSection]  # by family
    samples_per_part: int
    zstd_level: int


def spread(samples: Sequence[T], count: int) -> tuple[T, ...]:
    """At most `count` of the samples, or of their places, evenly spread over all."""
    count = min(count, len(samples))
    return tuple(samples[number * len(samples) // count] for number in range(count))


def calibrate(scorer: PartScorer, wanted: Wanted) -> dict[str, Choice]:
    """The choice for each family. Errors: ConfigError as `choose`; StillhouseError where nothing can be scored."""
    states: dict[str, list[Tensor]] = {family: [] for family in wanted.sections}
    errors: list[SampleError] = []
    known: set[str] = set()
    num_scored = 0
    for start in range(0, len(wanted.samples), _SAMPLES_PER_CALL):
        ready = scorer.prepare(wanted.samples[start : start + _SAMPLES_PER_CALL], errors)
        taken, hidden = scorer.hidden_states(ready, errors) if ready else ([], [])
        scored = [(one, own) for one, own in zip(taken, hidden, strict=True) if bool(torch.isfinite(own).all())]
        num_scored += len(scored)
        if "response" in states:
            states["response"] += [response_states(one, own) for one, own in scored]
        if "visual" in states:
            states["visual"] += [own.float() for own in new_images(scored, known).values()]
    found = {}
    for family, section in wanted.sections.items():
        whole = sum(map(len, states[family]))
        rows_of_samples = _within(states[family])
        if scorer.teacher is None or not rows_of_samples:
            why = errors[0].reason if errors else "they have no such rows"
            raise StillhouseError(
                f"cache.budget: no {family} rows of {len(wanted.samples)} samples can be scored: {why}"
            )
        rows = Rows(
            head=scorer.teacher.head,
            hidden=torch.cat(rows_of_samples).to(scorer.teacher.head.weight.device),
            sizes=tuple(map(len, rows_of_samples)),
            family=family,
            seed=section.seed,
            draw_sets=section.draw_sets,
            rows_per_part=max(1, round(whole / num_scored * wanted.samples_per_part)),
            zstd_level=wanted.zstd_level,
        )
        found[family] = choose(rows, wanted.budget)
    return found


def _within(states: Sequence[Tensor]) -> list[Tensor]:
    """Whole samples, spread over all, that have together at most MAX_ROWS rows; at least one."""
    there = [own for own in states if len(own)]
    kept = max(1, int(len(there) * min(1.0, MAX_ROWS / max(sum(map(len, there)), 1))))
    return [there[number * len(there) // kept] for number in range(kept)] if there else []
