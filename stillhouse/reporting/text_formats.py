"""Formats numbers and tables as plain text, for the terminal and the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

NO_CATEGORY = "no category"  # of samples whose source names none


def compute_mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "sd"}; sd is the sample's, None for a single value."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def format_percent(value: Mapping[str, float | None] | float | None) -> str:
    """A fraction as "68.8 %", or {"mean", "sd"} as "68.8 ± 0.7 %"; a dash for None, which was not measured."""
    if isinstance(value, Mapping):
        mean, sd = value["mean"], value["sd"]
        return format_percent(mean) if mean is None or sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f} %"
    return "–" if value is None else f"{100 * value:.1f} %"


def format_number(value: Mapping[str, float | None] | float | None, spec: str = ",") -> str:
    """A number by a format specification, or {"mean", "sd"} as "0.12 ± 0.01"; a dash for None."""
    if isinstance(value, Mapping):
        mean, sd = value["mean"], value["sd"]
        return format_number(mean, spec) if mean is None or sd is None else f"{mean:{spec}} ± {sd:{spec}}"
    return "–" if value is None else format(value, spec)


def format_columns(rows: Sequence[Sequence[str]], *, align_right: bool | None = None) -> str:
    """Rows of equal length as columns, two spaces apart, never cut to a terminal's width. The first is aligned left.

    `align_right` says how the other columns are aligned; None: right if there are several, left if there is one.
    """
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = ">" if (len(widths) > 2 if align_right is None else align_right) else "<"
    sides = ["<", *[side] * (len(widths) - 1)]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return "\n".join(map(str.rstrip, lines))
