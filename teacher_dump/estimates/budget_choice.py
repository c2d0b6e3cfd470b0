"""Chooses settings that meet `cache.budget`, with a teacher, and puts them into a planned dump's identity."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from storage.backends.folder import open_folder
from storage.encoding.part_encoder import PartEncoder
from storage.layout.segments import find_segment
from teacher_dump.planning.recorded_budget import describe_budget_request, make_comparable_identity

if TYPE_CHECKING:
    from teacher_dump.planning.dump_plan import DumpPlan
    from teacher_dump.settings import DumpSettings


def apply_budget(planned: DumpPlan, settings: DumpSettings) -> DumpPlan:
    """Returns the plan with the settings that cache.budget chooses; runs a teacher unless a cache records them.

    Raises ConfigError for a budget that cannot be met, with the nearest numbers; the errors of call_with_teacher.
    """
    cache, budget = settings.cache, settings.cache.budget
    asked = budget.families if budget is not None else ()
    missing = [family for family in asked if "budget" not in planned.identity.selection[family]]
    if budget is None or not missing:
        return planned
    folder = open_folder(cache.path)  # an incompatible cache is refused before anything is scored
    find_segment(folder, make_comparable_identity(planned.identity, cache), cache.families, append=cache.append)
    from teacher_dump.estimates.budget_calibration import BudgetTask, choose_settings, pick_evenly
    from teacher_dump.execution.worker_setup import call_with_teacher

    every = (sample for part in planned.plan.parts for sample in part.samples)
    places = set(pick_evenly(range(planned.plan.num_samples), budget.samples))
    samples = tuple(sample for place, sample in enumerate(every) if place in places)
    encoder = PartEncoder(planned.identity, tuple(missing), cache.zstd_level)
    task = BudgetTask(samples, budget, encoder, settings.dump.samples_per_part)
    chosen = call_with_teacher(planned, settings, choose_settings, task)
    selection = dict(planned.identity.selection)
    for family, choice in chosen.items():
        predicted = asdict(choice)
        setting = {name: predicted.pop(name) for name in ("tau", "rounding_kl")}
        selection[family] = {
            **selection[family],
            **setting,
            "budget": {**describe_budget_request(budget), "predicted": predicted},
        }
    return replace(planned, identity=planned.identity.model_copy(update={"selection": selection}))
