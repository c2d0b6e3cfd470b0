"""The settings that `cache.budget` has chosen for an existing cache."""

from __future__ import annotations

from typing import Any

from storage.backends.folder import open_folder
from storage.config import BudgetSection, CacheSection
from storage.identity import Identity
from storage.layout.segments import has_cache, merge_identities, read_segments


def read_recorded_choices(cache: CacheSection) -> dict[str, dict[str, Any]]:
    """Reads, by family, the settings that the same budget has chosen for an existing cache."""
    folder = open_folder(cache.path) if cache.budget else None
    if cache.budget is None or folder is None or not has_cache(folder):
        return {}
    stored, found = merge_identities(read_segments(folder)).selection, {}
    for family in cache.budget.families:
        budget = dict(stored.get(family, {}).get("budget", {}))
        budget.pop("predicted", None)
        if budget == describe_budget_request(cache.budget):
            found[family] = {name: stored[family][name] for name in ("tau", "rounding_kl", "budget")}
    return found


def make_comparable_identity(identity: Identity, cache: CacheSection) -> Identity:
    """Returns the identity with the budget's recorded choices filled in.

    So it differs from the existing cache's identity only where the user's settings differ.
    """
    folder, budget = open_folder(cache.path), cache.budget
    if budget is None or not has_cache(folder):
        return identity
    stored, selection = merge_identities(read_segments(folder)).selection, dict(identity.selection)
    for family in budget.families:
        there = stored.get(family, {})
        chosen = {name: there[name] for name in ("tau", "rounding_kl") if name in there}
        predicted = {name: value for name, value in there.get("budget", {}).items() if name == "predicted"}
        selection[family] = {**selection[family], **chosen, "budget": {**describe_budget_request(budget), **predicted}}
    return identity.model_copy(update={"selection": selection})


def describe_budget_request(budget: BudgetSection) -> dict[str, Any]:
    """Returns a budget's request in the form in which a cache records it."""
    return budget.model_dump(mode="json", exclude={"families"}, exclude_none=True)
