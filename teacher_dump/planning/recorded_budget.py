"""What `cache.budget` has chosen for a cache that is there."""

from __future__ import annotations

from typing import Any

from storage.backends.folder import open_folder
from storage.config import BudgetSection, CacheSection
from storage.identity import Identity
from storage.layout.segments import has_cache, merge_identities, read_segments


def recorded_choices(cache: CacheSection) -> dict[str, dict[str, Any]]:
    """What the same budget has chosen for a cache that lies there already, by family."""
    folder = open_folder(cache.path) if cache.budget else None
    if cache.budget is None or folder is None or not has_cache(folder):
        return {}
    stored, found = merge_identities(read_segments(folder)).selection, {}
    for family in cache.budget.families:
        budget = dict(stored.get(family, {}).get("budget", {}))
        budget.pop("predicted", None)
        if budget == asked_of(cache.budget):
            found[family] = {name: stored[family][name] for name in ("tau", "rounding_kl", "budget")}
    return found


def comparable(identity: Identity, cache: CacheSection) -> Identity:
    """An identity that differs from its cache's by what was asked, not by what cache.budget has yet to choose."""
    folder, budget = open_folder(cache.path), cache.budget
    if budget is None or not has_cache(folder):
        return identity
    stored, selection = merge_identities(read_segments(folder)).selection, dict(identity.selection)
    for family in budget.families:
        there = stored.get(family, {})
        chosen = {name: there[name] for name in ("tau", "rounding_kl") if name in there}
        predicted = {name: value for name, value in there.get("budget", {}).items() if name == "predicted"}
        selection[family] = {**selection[family], **chosen, "budget": {**asked_of(budget), **predicted}}
    return identity.model_copy(update={"selection": selection})


def asked_of(budget: BudgetSection) -> dict[str, Any]:
    """What a budget asks for, as a cache records it beside what was chosen."""
    return budget.model_dump(mode="json", exclude={"families"}, exclude_none=True)
