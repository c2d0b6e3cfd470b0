"""The slice of the engine check: every kind of sample, always the same."""

from __future__ import annotations

import random

import numpy as np

from storage.records.sample_key import SampleKey
from teacher_dump.data.sample import Sample
from teacher_dump.engine_check.slice_choice import KINDS, choose_slice, classify_sample


def make_sample(name: str, num_images: int) -> Sample:
    return Sample(SampleKey(name), "train", "", tuple(f"{at}.png" for at in range(num_images)), ())


def count_kinds(samples: tuple[Sample, ...]) -> list[int]:
    return [sum(classify_sample(sample) == kind for sample in samples) for kind in KINDS]


def test_every_kind_that_the_data_have_gets_an_equal_share():
    samples = [make_sample(str(at), (0, 1, 2)[at % 3]) for at in range(300)]
    assert count_kinds(choose_slice(samples, 16)) == [6, 5, 5]
    assert count_kinds(choose_slice(samples[:4], 16)) == [1, 1, 2]
    rare = [make_sample(str(at), 1) for at in range(300)] + [make_sample("two", 2), make_sample("text", 0)]
    assert count_kinds(choose_slice(rare, 16)) == [1, 14, 1]
    assert count_kinds(choose_slice(rare, 2)) == [1, 1, 0]
    assert choose_slice([], 16) == ()


def test_the_choice_depends_on_ids_alone():
    samples = [make_sample(str(at), at % 3) for at in range(200)]
    mixed = samples.copy()
    random.Random(0).shuffle(mixed)
    chosen = choose_slice(samples, 16)
    assert choose_slice(mixed, 16) == chosen
    assert len(set(chosen)) == 16
    places = [samples.index(sample) for sample in chosen]
    assert np.ptp(places) > 100  # of the whole data, not of their first rows
