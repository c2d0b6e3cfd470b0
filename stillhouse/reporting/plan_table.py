"""The forecast of a dump, for a terminal."""

from __future__ import annotations

from teacher_dump.estimates.cost_model import Forecast


def as_table(expected: Forecast) -> str:
    """Parts, bytes and time, and what they were reckoned from."""
    rows = [
        ("parts", f"{expected.parts:,}"),
        ("samples", f"{expected.samples:,}"),
        ("tokens", f"{expected.tokens:,}"),
        *((f"{family} rows", f"{count:,}") for family, count in expected.rows.items()),
        *((f"{family} bytes", f"{count:,}") for family, count in expected.family_bytes.items()),
        ("bytes in all", f"{expected.total_bytes:,}"),
        ("prompts alone", _duration(expected.stage_s["prompts"])),
        ("encoding alone", _duration(expected.stage_s["encoding"])),
        ("scoring and both", f"{_duration(expected.scoring_s)}, which dump.json will have as `seconds`"),
        ("start before that", f"{_duration(expected.start_s)}, of Ray and a teacher"),
    ]
    tried = (
        f"{expected.calibration_samples:,} samples were tried, {expected.calibration_errors:,} of them cannot be used"
    )
    data = (
        [] if expected.data is None else ["of these, and of the rows that could not be read:", *expected.data.lines()]
    )
    return "\n".join([*(f"{name:<20} {value}" for name, value in rows), tried, *data])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s"
