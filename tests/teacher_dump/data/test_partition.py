from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from storage.records.records import SampleError
from storage.records.sample_key import HALVES, SampleKey
from teacher_dump.data.partition import Part, make_plan
from teacher_dump.data.sample import Sample, Turn

TURNS = (Turn("user", "what?"), Turn("assistant", "red"))


def samples_of(images: list[tuple[str, ...]]) -> list[Sample]:
    return [Sample(SampleKey(str(number)), "train", "", shown, TURNS) for number, shown in enumerate(images)]


shown_images = st.lists(
    st.lists(st.sampled_from("abcdefgh"), max_size=3).map(tuple), max_size=30
)  # images of each sample


@given(shown_images, st.integers(1, 6))
def test_every_sample_is_in_one_part_and_no_image_in_two(images: list[tuple[str, ...]], size: int) -> None:
    plan = make_plan(samples_of(images), samples_per_part=size, max_length=8)
    ids = [sample.id for part in plan.parts for sample in part.samples]
    assert sorted(ids, key=int) == [str(number) for number in range(len(images))]
    assert [part.number for part in plan.parts] == list(range(len(plan.parts)))
    owners: dict[str, int] = {}
    for part in plan.parts:
        for image in {image for sample in part.samples for image in sample.images}:
            assert owners.setdefault(image, part.number) == part.number


def test_parts_are_filled_in_order_and_groups_are_not_cut() -> None:
    plan = make_plan(samples_of([("a",), (), ("b",), ("a",), ("b", "c"), ("c",)]), samples_per_part=3, max_length=8)
    assert [[sample.id for sample in part.samples] for part in plan.parts] == [
        ["0", "3", "1"],
        ["2", "4", "5"],
    ]
    whole = make_plan(samples_of([("a",)] * 5), samples_per_part=2, max_length=8)
    assert [len(part.samples) for part in whole.parts] == [5]


def test_fingerprint_follows_everything_that_decides_the_records() -> None:
    samples = samples_of([("a",), ("b",)])
    base = make_plan(samples, samples_per_part=2, max_length=8)
    assert base.fingerprint == make_plan(samples, samples_per_part=2, max_length=8).fingerprint
    others = [
        make_plan(samples, samples_per_part=1, max_length=8),
        make_plan(samples, samples_per_part=2, max_length=9),
        make_plan(samples[::-1], samples_per_part=2, max_length=8),
        make_plan(samples[:1], samples_per_part=2, max_length=8),
        make_plan(samples, errors=[SampleError("x", "bad")], samples_per_part=2, max_length=8),
        make_plan([replace(samples[0], key=SampleKey("0", source=1)), samples[1]], samples_per_part=2, max_length=8),
        make_plan(samples, samples_per_part=2, max_length=8, too_long="cut_turns"),
        make_plan(samples, samples_per_part=2, max_length=8, too_long="cut_answer"),
    ]
    assert len({base.fingerprint, *(plan.fingerprint for plan in others)}) == 9


def test_halves_of_a_pair_are_in_one_part_even_without_an_image() -> None:
    a, b, c = map(SampleKey, "abc")
    chosen, rejected = ([replace(key, half=half) for key in (a, b, c)] for half in HALVES)
    keys = [chosen[0], b, chosen[2], a, chosen[1], rejected[2], rejected[0], rejected[1]]
    samples = [Sample(key, "train", "", (), TURNS) for key in keys]
    plan = make_plan(samples, samples_per_part=2, max_length=8)
    assert [[sample.id for sample in part.samples] for part in plan.parts] == [
        ["a#chosen", "a#rejected"],
        ["b"],
        ["c#chosen", "c#rejected"],
        ["a"],
        ["b#chosen", "b#rejected"],
    ]


def test_own_ids_that_look_like_halves_form_no_group() -> None:
    samples = [Sample(SampleKey(name), "train", "", (), TURNS) for name in ("a#chosen", "a#rejected")]
    plan = make_plan(samples, samples_per_part=1, max_length=8)
    assert [[sample.id for sample in part.samples] for part in plan.parts] == [["a#chosen"], ["a#rejected"]]


def test_errors_travel_in_part_0_even_without_samples() -> None:
    errors = (SampleError("x", "bad"),)
    assert make_plan([], errors=errors, samples_per_part=2, max_length=8).parts == (Part(0, (), errors),)


def test_a_part_round_trips_through_text() -> None:
    part = Part(3, tuple(samples_of([("a",), ()])), (SampleError("x", "bäd"),))
    assert Part.from_text(part.to_text()) == part
