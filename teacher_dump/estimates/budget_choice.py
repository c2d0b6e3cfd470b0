"""What `cache.budget` has chosen for a cache, or chooses now, into the identity of a planned dump."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from storage.backends.folder import open_folder
from storage.config import BudgetSection, CacheSection
from storage.identity import Identity
from storage.layout.segments import find_segment, has_cache, merged_identity, read_segments

if TYPE_CHECKING:
    from teacher_dump.planning.dump_plan import DumpPlan
    from teacher_dump.settings import DumpSettings


def with_budget(planned: DumpPlan, settings: DumpSettings) -> DumpPlan:
    """The plan with what cache.budget chooses in its identity; asks a teacher where no cache has it recorded.

    Errors: ConfigError for a budget that cannot be met, with the nearest numbers; those of with_teacher.
    """
    cache, budget = settings.cache, settings.cache.budget
    asked = budget.families if budget is not None else ()
    missing = [family for family in asked if "budget" not in planned.identity.selection[family]]
    if budget is None or not missing:
        return planned
    folder = open_folder(cache.path)  # a cache that was made otherwise is refused before anything is scored
    find_segment(folder, comparable(planned.identity, cache), cache.families, append=cache.append)
    from teacher_dump.estimates.budget_calibration import Wanted, calibrate, spread
    from teacher_dump.execution.worker_setup import with_teacher

    every = (sample for part in planned.plan.parts for sample in part.samples)
    places = set(spread(range(planned.plan.num_samples), budget.samples))
    samples = tuple(sample for place, sample in enumerate(every) if place in places)
    sections = {family: getattr(settings.cache, family) for family in missing}
    wanted = Wanted(samples, budget, sections, settings.dump.samples_per_part, settings.cache.zstd_level)
    chosen = with_teacher(planned, settings, calibrate, wanted)
    selection = dict(planned.identity.selection)
    for family, choice in chosen.items():
        predicted = asdict(choice)
        setting = {name: predicted.pop(name) for name in ("tau", "rounding_kl")}
        selection[family] = {**selection[family], **setting, "budget": {**_asked(budget), "predicted": predicted}}
    return replace(planned, identity=planned.identity.model_copy(update={"selection": selection}))


def recorded_choices(cache: CacheSection) -> dict[str, dict[str, Any]]:
    """What the same budget has chosen for a cache that lies there already, by family."""
    folder = open_folder(cache.path) if cache.budget else None
    if cache.budget is None or folder is None or not has_cache(folder):
        return {}
    stored, found = merged_identity(read_segments(folder)).selection, {}
    for family in cache.budget.families:
        budget = dict(stored.get(family, {}).get("budget", {}))
        budget.pop("predicted", None)
        if budget == _asked(cache.budget):
            found[family] = {name: stored[family][name] for name in ("tau", "rounding_kl", "budget")}
    return found


def comparable(identity: Identity, cache: CacheSection) -> Identity:
    """An identity that differs from its cache's by what was asked, not by what cache.budget has yet to choose."""
    folder, budget = open_folder(cache.path), cache.budget
    if budget is None or not has_cache(folder):
        return identity
    stored, selection = merged_identity(read_segments(folder)).selection, dict(identity.selection)
    for family in budget.families:
        there = stored.get(family, {})
        chosen = {name: there[name] for name in ("tau", "rounding_kl") if name in there}
        predicted = {name: value for name, value in there.get("budget", {}).items() if name == "predicted"}
        selection[family] = {**selection[family], **chosen, "budget": {**_asked(budget), **predicted}}
    return identity.model_copy(update={"selection": selection})


def _asked(budget: BudgetSection) -> dict[str, Any]:
    return budget.model_dump(mode="json", exclude={"families"}, exclude_none=True)
