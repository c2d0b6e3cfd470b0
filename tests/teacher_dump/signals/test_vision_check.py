from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from storage.errors import StillhouseError
from storage.images.pictures import rotate_picture
from storage.images.settings import OLD_PIXELS
from storage.records.sample_key import SampleKey
from teacher_dump.data.sample import Sample
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.lm_head import OutputHead, read_head
from teacher_dump.signals.vision_check import check_vision, choose_check_samples
from teacher_dump.teachers.teacher import TeacherStates
from teacher_dump.teachers.transformers_teacher import TransformersTeacher
from tests.teacher_dump.scorers import EVERYTHING, make_scorer, part_of, reference_teacher
from tests.tiny import make_tiny_dataset


class BlindTeacher:
    """Shows its teacher the same image in place of every image."""

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher = teacher

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        image = prompts[0].images[0].resize((32, 32)).point(lambda _: 128)
        return self._teacher.hidden_states([TeacherPrompt(p.token_ids, (image,) * len(p.images)) for p in prompts])


@pytest.fixture(scope="module")
def reference(tiny_teacher: Path) -> TransformersTeacher:
    return reference_teacher(tiny_teacher)


@pytest.fixture(scope="module")
def head(tiny_teacher: Path) -> OutputHead:
    return read_head(tiny_teacher, vocab_size=300)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_working_teacher_passes_the_vision_check_and_a_blind_one_does_not(
    num_samples: int, tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    samples = choose_check_samples(part_of(tiny_data).samples, num_samples)
    assert len(samples) == num_samples
    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference)
    sight = check_vision(scorer, head, samples)
    assert sight is not None
    assert sight.num_samples == num_samples
    assert sight.change > 0.01 > 1e-4 > sight.noise
    assert sight.marked is not None
    assert sight.turned is not None
    assert sight.turned > 0.01 > 1e-4 > sight.marked
    blind = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, BlindTeacher(reference))
    with pytest.raises(StillhouseError, match=r"the teacher is blind.*blind_check_samples=0"):
        check_vision(blind, head, samples)


class RotatingTeacher:
    """Rotates images, as an engine that applies EXIF again: some, or at every second call."""

    def __init__(self, teacher: TransformersTeacher, turns: Callable[[str], bool]) -> None:
        self._teacher, self._turns = teacher, turns

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        return self._teacher.hidden_states(
            [
                replace(
                    prompt,
                    images=tuple(
                        rotate_picture(image) if self._turns(key) else image
                        for image, key in zip(prompt.images, prompt.image_keys, strict=True)
                    ),
                )
                for prompt in prompts
            ]
        )


def test_an_engine_that_turns_pictures_by_itself_is_refused(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    samples = choose_check_samples(part_of(tiny_data).samples, 2)
    cases = (("marked", "the teacher sees other pixels than those prepared for it"), ("turned", "ignores orientation"))
    for key_begins, said in cases:  # a turn that the file asked for was made twice; one that nobody asked for
        engine = RotatingTeacher(reference, lambda key, begins=key_begins: key.startswith(begins))
        with pytest.raises(StillhouseError, match=rf"{said}.*blind_check_samples=0"):
            check_vision(make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, engine), head, samples)


def test_pixels_that_ignore_orientation_are_refused(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    """Version 0 of the pixels leaves them as they lie in the file."""
    samples = choose_check_samples(part_of(tiny_data).samples, 2)
    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, reference)
    with pytest.raises(StillhouseError, match="other pixels than those prepared for it"):
        check_vision(scorer, head, samples, pixels=OLD_PIXELS)


def test_pictures_that_no_turn_changes_are_skipped(
    tmp_path: Path, tiny_teacher: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    data = make_tiny_dataset(tmp_path, num_samples=2, num_images=2)["train"]
    for number, shade in enumerate((20, 200)):
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(tmp_path / f"images/train-{number:03d}.png")
    scorer = make_scorer(tiny_teacher, tmp_path, EVERYTHING, reference)
    sight = check_vision(scorer, head, choose_check_samples(part_of(data).samples, 2))
    assert sight is not None
    assert sight.marked is sight.turned is None


def test_noise_alone_does_not_pass_the_vision_check(
    tiny_teacher: Path, tiny_data: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    generator = torch.Generator().manual_seed(0)

    class NoisyTeacher(BlindTeacher):
        def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
            states = super().hidden_states(prompts)
            return [
                replace(one, hidden=one.hidden + 0.05 * torch.randn(one.hidden.shape, generator=generator))
                for one in states
            ]

    scorer = make_scorer(tiny_teacher, tiny_data.parent, EVERYTHING, NoisyTeacher(reference))
    with pytest.raises(StillhouseError, match="blind"):
        check_vision(scorer, head, choose_check_samples(part_of(tiny_data).samples, 4))


def test_samples_without_usable_images_are_not_checked(
    tmp_path: Path, tiny_teacher: Path, reference: TransformersTeacher, head: OutputHead
) -> None:
    scorer = make_scorer(tiny_teacher, tmp_path, EVERYTHING, reference)
    assert check_vision(scorer, head, []) is None
    assert check_vision(scorer, head, [Sample(SampleKey("x"), "train", "", ("gone.png",), ())]) is None


def test_chosen_samples_show_different_images(tiny_data: Path) -> None:
    text_only = Sample(SampleKey("text"), "train", "", (), ())
    chosen = choose_check_samples([text_only, *part_of(tiny_data).samples], 100)
    assert len(chosen) == 8
    assert len({image for sample in chosen for image in sample.images}) == 8
