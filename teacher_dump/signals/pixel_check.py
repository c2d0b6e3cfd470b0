"""The pixel check: verifies that an engine's own processor computes the same pixel values as the teacher's.

An engine may rotate, flatten or resize images by itself, or load a processor of another library. Students get the
processor's values, so they would learn from signals of other pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from storage.errors import StillhouseError
from storage.images.pixels import Picture
from storage.images.placeholders import get_placeholder
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.teachers.teacher import ShowsPixels, Teacher

_log = logging.getLogger(__name__)


def check_pixel_values(
    engine: Teacher, processor: Any, samples: Sequence[PreparedSample], *, image_token_id: int
) -> int:
    """Compares the pixel values of samples' images; returns how many images were compared.

    That is 0 for an engine that does not expose its values. Raises StillhouseError if a value differs; values of
    another shape are logged and skipped.
    """
    if not isinstance(engine, ShowsPixels):
        return 0
    num_compared = 0
    for sample in samples:
        if not sample.images:
            continue
        for image, theirs in zip(sample.images, engine.pixel_values(sample.prompt), strict=True):
            ours = _compute_pixel_values(processor, image.pixels, image_token_id)
            if theirs is None or ours is None or theirs.numel() != ours.numel():
                _log.warning("%s: the engine's pixel values have another form, and were not compared", image.path)
                continue
            ours, theirs = ours.flatten().to(theirs.dtype), theirs.flatten()
            if not torch.equal(ours, theirs):
                largest = float((ours.double() - theirs.double()).abs().max())
                raise StillhouseError(
                    f"image {image.path!r}: the engine's pixel values differ from those of the teacher's processor by "
                    f"up to {largest:.2g}, expected the same to the bit; a student would see other pictures than the "
                    "teacher. Does its image processor use another library? (dump.blind_check_samples=0 skips this "
                    "check)"
                )
            num_compared += 1
    return num_compared


def _compute_pixel_values(processor: Any, picture: Picture, image_token_id: int) -> Tensor | None:
    token = get_placeholder(processor, processor.tokenizer.convert_ids_to_tokens(image_token_id))
    return processor(images=[picture], text=[token], return_tensors="pt").get("pixel_values")
