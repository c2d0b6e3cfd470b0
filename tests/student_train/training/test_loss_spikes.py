from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from student_train.training.loss_spikes import WINDOW, LossSpikeDetector

LOSSES = st.floats(-10, 10)


def watch(*losses: float, factor: float | None = 10.0) -> LossSpikeDetector:
    found = LossSpikeDetector(factor)
    for loss in losses:
        found.add(loss)
    return found


def test_the_limit_by_hand() -> None:
    assert watch(*[2.0] * (WINDOW - 1)).compute_limit() is None
    assert watch(*[2.0] * WINDOW).compute_limit() == 20
    assert watch(*[2.0] * WINDOW, *[1.0] * WINDOW).compute_limit() == 10
    assert watch(30.0, *[2.0] * WINDOW).compute_limit() == 30  # it began there
    assert watch(5.0, *[0.01] * WINDOW).compute_limit() == 5  # close to 0, where a hard batch is no explosion
    assert watch(*[-2.0] * WINDOW).compute_limit() == 20  # an unbiased estimate of a small divergence may be negative
    assert watch(*[2.0] * WINDOW, factor=None).compute_limit() is None


@given(losses=st.lists(LOSSES, min_size=WINDOW, max_size=2 * WINDOW))
def test_a_loss_below_earlier_ones_never_explodes(losses: list[float]) -> None:
    limit = watch(*losses).compute_limit()
    assert limit is not None
    assert all(loss <= limit for loss in losses)


@given(losses=st.lists(LOSSES, max_size=2 * WINDOW), later=st.lists(LOSSES, max_size=WINDOW))
def test_a_restored_detector_continues(losses: list[float], later: list[float]) -> None:
    restored = LossSpikeDetector(10.0)
    restored.load_state_dict(json.loads(json.dumps(watch(*losses).state_dict())))
    for loss in later:
        restored.add(loss)
    assert restored.compute_limit() == watch(*losses, *later).compute_limit()
