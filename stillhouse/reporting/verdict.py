"""States in one sentence whether distillation beat its controls and whether it is closer to the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from stillhouse.reporting.comparisons import Comparison


def find_best_run(runs: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> str | None:
    """The distilled run that the verdict is about: the most accurate of those with the most undistilled controls.

    None without a distilled run that has a control. `runs` as in report.json.
    """
    accuracy = {run["name"]: run["exact_match"]["mean"] for run in runs}
    distilled = {run["name"] for run in runs if run["distilled"]}
    compared = [each for each in comparisons if each.metric == "exact_match" and each.run in distilled]
    num_controls = Counter(each.run for each in compared if each.control not in distilled)
    names = dict.fromkeys(each.run for each in compared)
    return max(names, key=lambda name: (num_controls[name], accuracy[name]), default=None)


def select_controls(runs: Sequence[dict[str, Any]], controls: Set[str]) -> set[str]:
    """Those controls that the verdict speaks of: the ones without the teacher's rows; all if each has them."""
    return set(controls - {run["name"] for run in runs if run["distilled"]}) or set(controls)


def describe_verdict(runs: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> str:
    """The best distilled run against its best control, in exact match and in KL to the teacher, in one sentence.

    `runs` as in report.json, `comparisons` those of runs with their controls. A control that is distilled itself, such
    as a run with fewer losses, stands in the tables alone.
    """
    best = find_best_run(runs, comparisons)
    if best is None:
        return "There is nothing to compare: no distilled run has a control."
    controls = select_controls(runs, {each.control for each in comparisons if each.run == best})
    of_best = [each for each in comparisons if each.run == best and each.control in controls]
    parts = [
        _describe_gain([each for each in of_best if each.metric == "exact_match"]),
        _describe_closeness([each for each in of_best if each.metric == "kl_to_teacher"]),
    ]
    return "; ".join(filter(None, parts)) + "."


def describe_scope(runs: Sequence[dict[str, Any]]) -> str:
    """What the verdict is about, in full sentences: which answers were judged, and whether samples differ."""
    if not runs:
        return ""
    return " ".join(filter(None, (f"Exact match of {describe_judged_turns(runs)}.", _warn_of_other_samples(runs))))


def describe_judged_turns(runs: Sequence[dict[str, Any]]) -> str:
    """Which of a conversation's answers the runs were judged by, such as "all answers"."""
    return " and ".join(sorted({f"{run.get('turns') or 'first'} answers" for run in runs}))


def _describe_gain(comparisons: Sequence[Comparison]) -> str:
    """One run against a control over which no lead is shown, else against the one that it leads by the least."""
    least = min(comparisons, key=lambda each: (each.shown and each.difference > 0, each.difference))
    is_best = least.difference == min(each.difference for each in comparisons)
    others = f", the best of {len(comparisons)} controls," if len(comparisons) > 1 and is_best else ""
    points, interval = f"{100 * abs(least.difference):.1f} points", describe_interval(least, scale=100, digits=1)
    if least.num_seeds > 1:
        interval += f", {least.num_seeds} seeds"
    if least.shown:
        verb = "beats" if least.difference > 0 else "falls behind"
        return f"{least.run} {verb} {least.control}{others} by {points} ({interval})"
    return (
        f"That {least.run} beats {least.control}{others} is not shown: "
        f"{100 * least.difference:+.1f} points ({interval}; {describe_need(least)})"
    )


def _describe_closeness(comparisons: Sequence[Comparison]) -> str:
    """As `_describe_gain`, in KL to the teacher; empty where no KL was compared."""
    if not comparisons:
        return ""
    least = max(comparisons, key=lambda each: (not (each.shown and each.difference < 0), each.difference))
    nats, interval = f"{abs(least.difference):.3f} nats", describe_interval(least, scale=1, digits=3)
    if least.shown:
        side = "lower" if least.difference < 0 else "higher"
        return f"its KL to the teacher is {nats} {side} than that of {least.control} ({interval})"
    return (
        f"its KL to the teacher is not shown to differ from that of {least.control}: {least.difference:+.3f} nats "
        f"({interval}; {describe_need(least)})"
    )


def describe_interval(comparison: Comparison, *, scale: float, digits: int) -> str:
    """A comparison's interval in words; of an absolute difference where one is shown."""
    if comparison.low is None or comparison.high is None:
        return "one seed has no interval"
    limits = [scale * comparison.low, scale * comparison.high]
    if comparison.shown:
        limits = sorted(map(abs, limits))
    return f"95 % interval {limits[0]:.{digits}f} to {limits[1]:.{digits}f}"


def describe_need(comparison: Comparison) -> str:
    """How many seeds would show a difference of this size."""
    if comparison.num_seeds < 2:
        return "take several seeds"
    if comparison.seeds_needed is None:
        return "more questions, not seeds, would show a difference of this size"
    return f"would need about {comparison.seeds_needed} seeds"


def _warn_of_other_samples(runs: Sequence[dict[str, Any]]) -> str:
    """A warning where runs were judged on different samples: a run is judged on those of all its stage's caches."""
    numbers = {run["name"]: run.get("num_held_out") for run in runs}
    if len(set(numbers.values())) < 2:
        return ""
    listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return f"Beware of differences between runs that were judged on other samples; numbers of samples: {listed}."
