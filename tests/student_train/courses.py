"""The course that a training took: its metrics and its weights, compared with another's."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

MEASURED = ("samples_per_s", "tokens_per_s", "memory_bytes")  # differs each time


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_course(ours: Path, theirs: Path, *, without: Collection[str] = ()) -> None:
    """Losses and gradient norms of every step agree, and so do the trained weights."""
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {*MEASURED, "padding_fraction", *without}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (name, mine["step"])
    weights, others = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert weights.keys() == others.keys()
    # Adam divides by the gradient's size, so where a gradient is rounding noise its step is too: lr is 2e-3.
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 5e-4
