"""What a grid cost with the cache, and what it would have cost with the teacher in every step.

With the teacher in every step a distilled run takes its own measured seconds and, for each sample that it trains on,
the dump's measured seconds a sample. With the cache it takes its own seconds alone, and the dump is paid once. Not
counted: the start of Ray and of the engine (once for a dump, once for each run with its teacher), further caches
(`more_caches`, and those of rounds with their answers), and the memory that a teacher beside the student would need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def compute_cost(
    entries: Sequence[dict[str, Any]], distilled: set[str], dump: dict[str, Any], num_samples: int
) -> dict[str, float]:
    """The cost of a grid in seconds; empty where the dump or a run was not measured as a whole.

    A run that was stopped and resumed knows only the seconds since then.
    `entries`: the results of each run and seed. `distilled`: names of the runs that learn from the teacher.
    `dump`: of dump.json. `num_samples`: of the cache.
    """
    of_teacher = [entry for entry in entries if entry["name"] in distilled]
    if not of_teacher or not dump.get("seconds") or not dump.get("num_samples"):
        return {}
    if any("num_samples_trained" not in entry or entry.get("resumed_at") for entry in entries):
        return {}
    per_sample = dump["seconds"] / dump["num_samples"]
    own, dumped = sum(entry["seconds"] for entry in entries), per_sample * num_samples
    asked = per_sample * sum(entry["num_samples_trained"] for entry in of_teacher)
    return {
        "dump_s": dumped,
        "teacher_s_per_sample": per_sample,
        "cached_s": own + dumped,
        "with_teacher_in_every_step_s": own + asked,
        "runs_to_break_even": math.ceil(dumped / (asked / len(of_teacher))),
        "num_distilled": len(of_teacher),
    }


def describe_cost(cost: dict[str, float]) -> str:
    """The cost in one sentence; empty where it was not measured, see `explain_missing_cost`."""
    if not cost:
        return ""
    own, other = cost["cached_s"] - cost["dump_s"], cost["with_teacher_in_every_step_s"]
    runs = f"{cost['runs_to_break_even']:.0f} distilled run{'s' if cost['runs_to_break_even'] > 1 else ''}"
    paid = cost["runs_to_break_even"] <= cost["num_distilled"]
    return (
        f"Summed over runs, training took {format_seconds(own)} and the dump {format_seconds(cost['dump_s'])}; with "
        f"the teacher in every step, at the dump's rate, it would have been {format_seconds(other)}; the cache "
        f"{'paid' if paid else 'pays'} for itself after {runs}."
    )


def explain_missing_cost(entries: Sequence[dict[str, Any]], distilled: set[str], dump: dict[str, Any]) -> str:
    """Why `compute_cost` gave nothing, in one sentence."""
    if not any(entry["name"] in distilled for entry in entries):
        return "What the cache saved is not known, since no run is distilled."
    if not dump.get("seconds") or not dump.get("num_samples"):
        return "What the cache saved is not known, since its dump left no measured seconds."
    label = next(
        (f"{entry['name']}-seed{entry['seed']}" for entry in entries if entry.get("resumed_at")),
        None,
    )
    if label is not None:
        return f"What the cache saved is not known, since {label} was resumed and measured its end alone."
    return "What the cache saved is not known, since runs of an earlier version did not count their samples."


def format_seconds(seconds: float) -> str:
    """A duration with two digits or more: "41 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
