"""Real response rows of the digits teacher: of `make demo` where it has run, else of one trained here in short.

The student is the teacher with Gaussian weight noise, scaled to a mean KL of 0.3 nats.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.digits_run import SHORT_STEPS, digits_run
from benchmarks.text_rows import NUM_ROWS, TeacherRows, make_student, noise_for_kl, noisy
from storage.identity import stored_pixels
from storage.reader.cache import Cache
from student_train.data.collate import collate
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer
from student_train.models.loading import load_for_inference, read_checkpoint
from student_train.models.student import Student

_BATCH = 64


def read(demo: Path, report: Callable[[str], None]) -> TeacherRows:
    """The teacher's rows over the first answers of its training data, and a noisy student of it."""
    run = digits_run(demo, teacher_steps=SHORT_STEPS, report=report)
    cache = Cache.open(run / "data/teacher_cache", ())
    checkpoint = read_checkpoint(run / "models/teacher")
    folder = ImageFolder(cache.image_root, checkpoint.image_processor, pixels=stored_pixels(cache.identity))
    vision = VisionGatherer(folder, features=TensorStore(1 << 30), pixels=TensorStore(0))
    student = load_for_inference(checkpoint, vocab_size=cache.identity.vocab_size)
    batches = _batches(cache, checkpoint.sequence_format, vision.gather)
    hidden, labels = _rows(student, batches)
    weight = _weight(student)

    def changed(noise: float) -> tuple[Tensor, Tensor]:
        copied = load_for_inference(checkpoint, vocab_size=cache.identity.vocab_size)
        copied.model.model.language_model = noisy(copied.model.model.language_model, noise)
        return _rows(copied, batches)[0], weight

    def divergence(noise: float) -> float:
        return make_student("probe", *changed(noise), (hidden, weight), 1.0).mean_kl

    noise = noise_for_kl(divergence, start=0.1)
    noisy_student = make_student("noisy", *changed(noise), (hidden, weight), 1.0)
    report(f"digits ({run}): student of {100 * noise:.1f} % weight noise, mean KL {noisy_student.mean_kl:.3f} nats")
    return TeacherRows("digits", hidden, weight, 1.0, labels, (noisy_student,))


def _batches(cache: Cache, sequence_format: Any, gather: Any) -> list[Any]:
    batches, num_rows = [], 0
    for start in range(0, cache.num_samples, _BATCH):
        samples = cache.read_many(range(start, min(start + _BATCH, cache.num_samples)))
        batches.append(collate(samples, sequence_format, gather))
        num_rows += len(batches[-1].labels)
        if num_rows >= NUM_ROWS:
            return batches
    raise SystemExit(f"the digits teacher's cache has {num_rows} response rows, {NUM_ROWS} are needed")


@torch.inference_mode()
def _rows(student: Student, batches: list[Any]) -> tuple[Tensor, Tensor]:
    hidden, labels = [], []
    for batch in batches:
        states = student.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
        hidden.append(states.index_select(0, batch.response_positions))
        labels.append(batch.labels)
    return torch.cat(hidden)[:NUM_ROWS].clone(), torch.cat(labels)[:NUM_ROWS]


@torch.inference_mode()
def _weight(student: Student) -> Tensor:
    width = student.model.lm_head.weight.shape[1]
    return student.compute_logits(torch.eye(width)).T.contiguous()
