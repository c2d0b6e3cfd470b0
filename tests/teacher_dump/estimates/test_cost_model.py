"""The forecast's arithmetic, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.records.sample_key import SampleKey
from teacher_dump.data.sample import Sample, Turn
from teacher_dump.estimates.cost_model import Calibration, SampleCounts, SliceCost, Work, forecast

WORK = Work(samples=8, text_tokens=200, visual_tokens=128, response_rows=80, visual_rows=64, images=4)
HALF = Work(samples=4, text_tokens=100, visual_tokens=64, response_rows=40, visual_rows=32, images=2)
TRIED = Calibration(
    counts=SampleCounts(samples=10, characters=1000, images=4, image_places=8),
    whole=SliceCost(WORK, {"tokens": 500, "response": 1000, "visual": 640, "relation": 90}),
    halves=(
        SliceCost(HALF, {"tokens": 300, "response": 580, "visual": 320, "relation": 50}),
        SliceCost(HALF, {"tokens": 300, "response": 620, "visual": 320, "relation": 50}),
    ),
    seconds={"prompts": 1.0, "encoding": 2.0, "scoring": 4.0},
    start_s=20.0,
    num_errors=2,
)
EVERY = SampleCounts(samples=100, characters=9000, images=50, image_places=90)


def test_a_plan_is_its_slice_scaled_by_text_and_by_images():
    found = forecast(TRIED, EVERY, num_parts=5, num_actors=1)
    assert (found.parts, found.samples) == (5, 80)  # two of ten cannot be used
    assert found.tokens == 200 * 9 + 128 * 90 // 8  # text by characters, visual tokens by images of all samples
    assert found.rows == {"response": 80 * 9, "visual": 64 * 50 // 4}
    assert found.family_bytes == {
        "tokens": 5 * 100 + 2 * 1800,  # 300 at 100 tokens, 500 at 200: a part costs 100, a token 2
        "response": 5 * 200 + 10 * 720,
        "visual": 10 * 800,  # a part costs nothing
        "relation": 5 * 10 + 20 * 50,
    }
    assert found.total_bytes == 4100 + 8200 + 8000 + 1050
    assert found.stage_s == {"prompts": 10.0, "encoding": 20.0, "scoring": pytest.approx(4 * 3240 / 328)}
    assert found.scoring_s == pytest.approx(4 * 3240 / 328)  # measured with the others beside it, so it is all
    assert found.start_s == 20.0


def test_actors_share_the_time_as_far_as_there_are_parts():
    one = forecast(TRIED, EVERY, num_parts=5, num_actors=1)
    assert forecast(TRIED, EVERY, num_parts=5, num_actors=4).scoring_s == pytest.approx(one.scoring_s / 4)
    assert forecast(TRIED, EVERY, num_parts=5, num_actors=9).scoring_s == pytest.approx(one.scoring_s / 5)


def test_a_file_that_does_not_grow_costs_each_part_the_same():
    flat = {"tokens": 500, "response": 1000, "visual": 100, "relation": 90}
    halves = tuple(replace(half, family_bytes={**half.family_bytes, "visual": 120}) for half in TRIED.halves)
    found = forecast(
        replace(TRIED, whole=SliceCost(WORK, flat), halves=halves, head_bytes=7), EVERY, num_parts=5, num_actors=1
    )
    assert found.family_bytes["visual"] == 500
    assert found.family_bytes["head"] == 7


def test_a_plan_without_images_has_no_visual_work():
    text = replace(WORK, visual_tokens=0, visual_rows=0, images=0)
    tried = replace(
        TRIED,
        counts=replace(TRIED.counts, images=0, image_places=0),
        whole=SliceCost(text, {"tokens": 500, "visual": 30}),
        halves=(SliceCost(replace(HALF, visual_tokens=0, visual_rows=0, images=0), {"tokens": 300, "visual": 30}),),
    )
    found = forecast(tried, replace(EVERY, images=0, image_places=0), num_parts=5, num_actors=1)
    assert found.tokens == 1800
    assert found.rows["visual"] == 0
    assert found.family_bytes == {"tokens": 4100, "visual": 150}


def test_nothing_is_forecast_from_samples_of_which_none_has_a_record():
    with pytest.raises(ValueError, match="none of the samples"):
        forecast(
            replace(TRIED, whole=replace(TRIED.whole, work=replace(WORK, samples=0))), EVERY, num_parts=5, num_actors=1
        )


def test_shared_images_are_counted_once_and_in_each_place():
    turns = (Turn("user", "<image>\nwhat?"), Turn("assistant", "red"))
    samples = [
        Sample(SampleKey(name), "train", "", images, turns) for name, images in (("a", ("x",)), ("b", ("x", "y")))
    ]
    assert SampleCounts.count(samples) == SampleCounts(samples=2, characters=2 * 16, images=2, image_places=3)
