"""Says what was trained: by which settings the runs of a grid differ, and what each reads of the caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CACHED_LOSSES = {"response": "response", "visual": "visual", "relation": "relation", "preference": "sequence"}
_OWN = ("stage.seed",)  # differ within a run
_NOTHING = "–"


def find_differences(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, str]]:
    """Of each run, the settings that are not the same in all runs, by their names; as recorded when it was trained.

    A run whose folder does not say how it was trained has none.
    """
    settings = {
        name: _flatten(seeds[0]["inputs"]) | {"caches": seeds[0].get("train_caches")}
        for name, seeds in runs.items()
        if seeds[0].get("inputs")
    }
    fields = sorted({field for of_run in settings.values() for field in of_run if field not in _OWN})
    differing = [field for field in fields if len({_show(of_run.get(field)) for of_run in settings.values()}) > 1]
    kept = [field for field in differing if not _is_part_of_unset(field, differing, settings)]
    return {
        name: {field.removeprefix("stage."): _show(of_run.get(field)) for field in kept}
        for name, of_run in settings.items()
    }


def _flatten(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name; those of data are named by the cache's number if there are several."""
    flat = _flatten_section("stage", inputs.get("stage", {}))
    caches = inputs.get("caches", [])
    for number, cache in enumerate(caches, 1):
        place = "data" if len(caches) == 1 else f"data {number}"
        flat |= {f"{place}.{name}": cache.get(name) for name in ("splits", "filter", "weight", "num_samples")}
    return flat


def _flatten_section(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {place: value}
    parts = [_flatten_section(f"{place}.{name}", each) for name, each in value.items()]
    return {name: each for part in parts for name, each in part.items()}


def _is_part_of_unset(field: str, differing: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a field only says how a loss works that some runs lack: it is the same in all runs that have it.

    The weight of the loss is shown, or its first field where it has none.
    """
    having = {_show(of_run[field]) for of_run in settings.values() if field in of_run}
    section = field.rpartition(".")[0]
    siblings = [other for other in differing if other.rpartition(".")[0] == section]
    shown = f"{section}.weight" if f"{section}.weight" in siblings else siblings[0]
    lacking = any(field not in of_run for of_run in settings.values())
    return lacking and len(having) == 1 and field != shown


def _show(value: Any) -> str:
    if value is None or value == []:
        return _NOTHING
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def list_families(entry: Mapping[str, Any]) -> list[str]:
    """Families of the cache that a run's losses read, besides tokens; of the last losses that it logged."""
    return [family for loss, family in CACHED_LOSSES.items() if loss in entry.get("final", {})]


def compute_bytes_a_row(families: Sequence[str], caches: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes of these families for each cached row of an answer; None where the caches have no such rows.

    `caches`: those that a run trains on, as `read_cache` describes them.
    """
    num_rows = sum(cache.get("num_rows_by_family", {}).get("response", 0) for cache in caches)
    num_bytes = sum(cache["bytes_by_family"].get(family, 0) for cache in caches for family in families)
    return num_bytes / num_rows if num_rows else None
