"""Formats the forecast of a dump for a terminal."""

from __future__ import annotations

from stillhouse.reporting.text_formats import format_columns
from teacher_dump.estimates.cost_model import Forecast


def format_forecast(forecast: Forecast) -> str:
    """Formats a dump's size and time as text, then how many samples were tried and refused, and why."""
    rows = [
        ("parts", f"{forecast.parts:,}"),
        ("samples", f"{forecast.samples:,}"),
        ("tokens", f"{forecast.tokens:,}"),
        *((f"{family} rows", f"{count:,}") for family, count in forecast.rows.items()),
        *((f"{family} bytes", f"{count:,}") for family, count in forecast.family_bytes.items()),
        ("bytes in all", f"{forecast.total_bytes:,}"),
        ("prompts alone", _format_duration(forecast.stage_s["prompts"])),
        ("encoding alone", _format_duration(forecast.stage_s["encoding"])),
        ("scoring and both", f"{_format_duration(forecast.scoring_s)}, which dump.json will have as `seconds`"),
        ("start before that", f"{_format_duration(forecast.start_s)}, of Ray and a teacher"),
    ]
    tried, refused = f"{forecast.calibration_samples:,}", f"{forecast.calibration_errors:,}"
    lines = [format_columns(rows), f"{tried} samples were tried, {refused} of them cannot be used"]
    if forecast.data is not None:
        lines += ["of these, and of the rows that could not be read:", *forecast.data.format_lines()]
    return "\n".join(lines)


def _format_duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s"
