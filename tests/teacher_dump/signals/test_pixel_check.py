"""An engine's own pixel values are compared with those of the teacher's processor, which students use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.errors import StillhouseError
from teacher_dump.data.sample import Sample
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.prompts.processor import load_processor
from teacher_dump.prompts.teacher_prompt import TeacherPrompt
from teacher_dump.signals.pixel_check import check_pixel_values
from teacher_dump.teachers.teacher import TeacherStates
from tests.teacher_dump.scorers import NOTHING, make_scorer, part_of
from tests.tiny import make_tiny_dataset

IMAGE_TOKEN_ID = 299


class PixelEngine:
    """An engine that exposes a processor's pixel values, changed by the test."""

    def __init__(self, processor: Any, change: Callable[[Tensor], Tensor | None]) -> None:
        self._processor, self._change = processor, change

    def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
        raise AssertionError("only pixel values are asked for")

    def pixel_values(self, prompt: TeacherPrompt) -> list[Tensor | None]:
        values = self._processor.image_processor(images=list(prompt.images), return_tensors="pt")["pixel_values"]
        return [self._change(each) for each in values]


@pytest.fixture
def ready(tiny_teacher: Path, tmp_path: Path) -> tuple[PreparedSample, ...]:
    """Returns two samples with images larger than the tower's input, and one without images."""
    data = make_tiny_dataset(tmp_path, num_samples=2, num_images=2, image_size=80)["train"]
    scorer = make_scorer(tiny_teacher, tmp_path, NOTHING, None)
    samples: tuple[Sample, ...] = tuple(part_of(data).samples)
    found = scorer.prepare(samples).ready
    assert len(found) == 2
    return found


def test_equal_values_are_counted_in_any_dtype_and_shape(tiny_teacher: Path, ready: tuple[PreparedSample, ...]) -> None:
    processor = load_processor(tiny_teacher)
    for change in (lambda values: values, lambda values: values[None].to(torch.bfloat16)):
        engine = PixelEngine(processor, change)
        assert check_pixel_values(engine, processor, ready, image_token_id=IMAGE_TOKEN_ID) == 2


def test_values_of_another_resizing_library_are_refused(tiny_teacher: Path, ready: tuple[PreparedSample, ...]) -> None:
    from transformers import AutoProcessor

    processor, other = load_processor(tiny_teacher), AutoProcessor.from_pretrained(tiny_teacher, backend="torchvision")
    assert (processor.image_processor.backend, other.image_processor.backend) == ("pil", "torchvision")
    engine = PixelEngine(other, lambda values: values)
    with pytest.raises(StillhouseError, match=r"images/train-000\.png'.*another library.*blind_check_samples=0"):
        check_pixel_values(engine, processor, ready, image_token_id=IMAGE_TOKEN_ID)


def test_a_picture_that_the_engine_turned_is_refused(tiny_teacher: Path, ready: tuple[PreparedSample, ...]) -> None:
    processor = load_processor(tiny_teacher)
    engine = PixelEngine(processor, lambda values: values.flip(1))
    with pytest.raises(StillhouseError, match="differ from those of the teacher's processor by up to"):
        check_pixel_values(engine, processor, ready, image_token_id=IMAGE_TOKEN_ID)


def test_values_in_another_form_are_logged(
    tiny_teacher: Path, ready: tuple[PreparedSample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(tiny_teacher)
    for change in (lambda _: None, lambda values: values[:, :8]):
        engine = PixelEngine(processor, change)
        assert check_pixel_values(engine, processor, ready, image_token_id=IMAGE_TOKEN_ID) == 0
        assert "were not compared" in caplog.text
        caplog.clear()


def test_an_engine_without_pixel_values_is_skipped(tiny_teacher: Path, ready: tuple[PreparedSample, ...]) -> None:
    class SilentEngine:
        def hidden_states(self, prompts: Sequence[TeacherPrompt]) -> list[TeacherStates]:
            raise AssertionError("only pixel values are asked for")

    processor = load_processor(tiny_teacher)
    assert check_pixel_values(SilentEngine(), processor, ready, image_token_id=IMAGE_TOKEN_ID) == 0
