"""Makes scorers over the tiny teacher, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.images.settings import PixelSettings
from storage.selection import Threshold, TopK
from teacher_dump.config import SourceSection
from teacher_dump.data.dataset import read_samples
from teacher_dump.data.partition import Part
from teacher_dump.prompts.image_tokens import VisualGrid
from teacher_dump.prompts.preparation import Preparer
from teacher_dump.prompts.preprocessor import PromptBuilder
from teacher_dump.prompts.processor import load_processor
from teacher_dump.signals.lm_head import read_head
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.scoring import PartScorer
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.teachers import fingerprint
from teacher_dump.teachers.teacher import Teacher
from teacher_dump.teachers.transformers_teacher import TransformersTeacher

EVERYTHING = SignalRequest(
    response=RowRequest(TopK(300), 0), visual=RowRequest(Threshold(0.02), 0), relation_centered=False
)
NOTHING = SignalRequest()


def part_of(file: Path, **fields: Any) -> Part:
    """Returns all samples of a file as one part."""
    found = read_samples([SourceSection(path=str(file), **fields)], extracted=file.parent / "extracted")
    return Part(0, found.samples, found.errors)


def reference_teacher(folder: Path) -> TransformersTeacher:
    return TransformersTeacher(folder, dtype="float32", image_token_id=299, settings={})


def make_scorer(
    folder: Path,
    image_root: Path,
    request: SignalRequest,
    engine: Teacher | None,
    *,
    max_length: int = 256,
    pixels: PixelSettings | None = None,
) -> PartScorer:
    """Makes a scorer with the test's engine."""
    processor = load_processor(folder)
    pixels = pixels or PixelSettings()
    facts = fingerprint.read_processor_facts(folder, processor).with_background(pixels.background)
    preparer = Preparer(
        prompts=PromptBuilder(processor, image_token_id=facts.image_token_id, eos_token_ids=facts.eos_token_ids),
        grid=VisualGrid(processor, facts.image_token_id),
        image_token_id=facts.image_token_id,
        preprocessing_fingerprint=facts.image_preprocessing_fingerprint,
        pixels=pixels,
        image_root=image_root,
        max_length=max_length,
    )
    teacher = None if engine is None else LoadedTeacher(engine, read_head(folder, vocab_size=facts.vocab_size))
    return PartScorer(preparer, request, teacher)
