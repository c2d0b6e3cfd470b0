"""States in sentences which distilled runs beat their controls, judged by paired 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any


def describe_verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Which distilled runs beat all of their controls in exact match, and which are closer to the teacher.

    Either can be true without the other. `runs` as in report.json.
    """
    distilled = [run for run in runs if run["distilled"] and run["paired"]]
    if not distilled:
        return "There is nothing to compare: no distilled run has a control."
    wins = [run for run in distilled if all(map(_is_above_zero, run["paired"].values()))]
    others = [run for run in distilled if run not in wins]
    describe_points = partial(_describe_differences, field="paired", unit="points", scale=100, digits=1)
    parts = []
    if wins:
        parts.append(f"Distillation beat its controls in {describe_points(wins)}")
    if others:
        opening = "but not" if wins else "Distillation did not beat its controls"
        parts.append(f"{opening} by more than the seeds' spread in {describe_points(others)}")
    judged = f"Exact match of {describe_judged_turns(runs)}, paired by seed, with 95 % intervals."
    return f"{', '.join(parts)}. {judged}{_describe_closeness(distilled)}{_warn_of_other_samples(runs)}"


def describe_judged_turns(runs: Sequence[dict[str, Any]]) -> str:
    """Which of a conversation's answers the runs were judged by, such as "all answers"."""
    return " and ".join(sorted({f"{run.get('turns') or 'first'} answers" for run in runs}))


def _describe_closeness(distilled: Sequence[dict[str, Any]]) -> str:
    """Which runs have a lower KL to the teacher than all of their controls; empty where no KL was compared."""
    measured = [run for run in distilled if run.get("paired_kl_to_teacher")]
    lower = [run for run in measured if all(map(_is_below_zero, run["paired_kl_to_teacher"].values()))]
    higher = [run for run in measured if any(map(_is_above_zero, run["paired_kl_to_teacher"].values()))]
    others = [run for run in measured if run not in lower and run not in higher]
    groups = (("lower", lower), ("higher", higher), ("not shown to differ", others))
    describe_nats = partial(_describe_differences, field="paired_kl_to_teacher", unit="nats", scale=1, digits=3)
    parts = [f"{verb} in {describe_nats(group)}" for verb, group in groups if group]
    return f" KL to the teacher: {', '.join(parts)}." if parts else ""


def _warn_of_other_samples(runs: Sequence[dict[str, Any]]) -> str:
    """A warning where runs were judged on different samples: a run is judged on those of all its stage's caches."""
    numbers = {run["name"]: run.get("num_held_out") for run in runs}
    if len(set(numbers.values())) < 2:
        return ""
    listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return f" Beware of differences between runs that were judged on other samples; numbers of samples: {listed}."


def _is_below_zero(difference: dict[str, float | None]) -> bool:
    return difference["high"] is not None and difference["high"] < 0


def _is_above_zero(difference: dict[str, float | None]) -> bool:
    return difference["low"] is not None and difference["low"] > 0


def _describe_differences(runs: Sequence[dict[str, Any]], field: str, unit: str, *, scale: float, digits: int) -> str:
    """Runs with their differences to controls: "kd (+1.2 points [+0.5, +1.9] to sft); …"."""
    texts = []
    for run in runs:
        differences = []
        for control, paired in run[field].items():
            mean, *limits = (
                f"{scale * paired[name]:+.{digits}f}" for name in ("mean", "low", "high") if paired[name] is not None
            )
            interval = f" [{', '.join(limits)}]" if limits else ""
            differences.append(f"{mean} {unit}{interval} to {control}")
        texts.append(f"{run['name']} ({', '.join(differences)})")
    return "; ".join(texts)
