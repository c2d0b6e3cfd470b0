"""The vision check: verifies that a teacher's answers depend on its images, before any expensive scoring.

A teacher whose vision weights were silently not loaded still answers. Source: KDFlow issue 9 (RECIPES §4).
It compares the samples with their images swapped, the same samples in another order, and the samples turned upside
down: a file whose EXIF says upside down must give the upright picture's answer, a picture upside down another one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from storage.errors import StillhouseError
from storage.images.pictures import encode_picture, invert_picture, resize_picture, rotate_picture
from storage.images.pixels import make_pixels
from storage.images.settings import PixelSettings
from teacher_dump.data.image_loading import LoadedImage
from teacher_dump.data.sample import Sample
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.scoring import PartScorer

_LEAST_CHANGE = 1e-3  # total variation of the most changed row; a working teacher gives 0.01 to 1
_NOISE_FACTOR = 4.0  # times the difference between two runs of the same samples


@dataclass(frozen=True)
class VisionCheck:
    """Changes of the teacher's answers: total variation of the most changed response row, 0 to 1."""

    num_samples: int
    change: float  # images swapped
    noise: float  # nothing swapped, samples in another order
    marked: float | None = None  # files upside down with an EXIF mark; None: turning changes no image
    turned: float | None = None  # pictures upside down

    @property
    def limit(self) -> float:
        """The least change that counts."""
        return max(_LEAST_CHANGE, _NOISE_FACTOR * self.noise)

    @property
    def is_blind(self) -> bool:
        return self.change <= self.limit

    @property
    def is_turned_wrongly(self) -> bool:
        """Whether a file's orientation is not applied, or is applied twice."""
        return self.marked is not None and self.marked > self.limit

    @property
    def is_blind_to_turns(self) -> bool:
        return self.turned is not None and self.turned <= self.limit


def choose_check_samples(samples: Iterable[Sample], num_samples: int) -> tuple[Sample, ...]:
    """Returns the first samples whose images no earlier chosen sample shows."""
    chosen: list[Sample] = []
    seen: set[str] = set()
    for sample in samples:
        if len(chosen) == num_samples:
            break
        if sample.images and seen.isdisjoint(sample.images):
            seen.update(sample.images)
            chosen.append(sample)
    return tuple(chosen)


def check_vision(
    scorer: PartScorer, head: OutputHead, samples: Sequence[Sample], *, pixels: PixelSettings | None = None
) -> VisionCheck | None:
    """Swaps and turns the images of samples, and measures how the distributions of their answers change.

    `pixels`: how a file's bytes become pixels. Returns None if no sample can be scored. Raises StillhouseError if the
    teacher is blind, or sees other pixels than those prepared for it.
    """
    ready = scorer.prepare(samples).ready
    if not ready:
        return None
    plain = _compute_answers(scorer, head, ready)
    swapped = _compute_answers(scorer, head, _swap_images(ready))
    again = _compute_answers(scorer, head, ready[::-1])
    shared = plain.keys() & swapped.keys() & again.keys()
    if not shared:
        return None
    turnable = [sample for sample in ready if any(_is_changed_by_turning(image) for image in sample.images)]
    settings = pixels or PixelSettings()
    marked = _compute_answers(
        scorer, head, [_change_images(sample, partial(_mark_image, settings)) for sample in turnable]
    )
    turned = _compute_answers(scorer, head, [_change_images(sample, _turn_image) for sample in turnable])
    result = VisionCheck(
        num_samples=len(shared),
        change=_find_greatest_change(plain, swapped) or 0.0,
        noise=_find_greatest_change(plain, again) or 0.0,
        marked=_find_greatest_change(plain, marked),
        turned=_find_greatest_change(plain, turned),
    )
    logging.getLogger(__name__).info("vision check: %s", result)
    if result.is_blind:
        raise StillhouseError(
            f"the teacher is blind: with the images of {result.num_samples} samples swapped, no answer's "
            f"distribution moved by more than {result.change:.2g} (the same samples asked twice differ by "
            f"{result.noise:.2g}); are its vision weights loaded? (dump.blind_check_samples=0 skips this check)"
        )
    if result.is_turned_wrongly:
        raise StillhouseError(
            f"the teacher sees other pixels than those prepared for it: a file whose EXIF says upside down "
            f"moved an answer's distribution by {result.marked:.2g} from that of the upright picture (the same samples "
            f"asked twice differ by {result.noise:.2g}); expected no more than {result.limit:.2g}. Does the engine "
            "rotate images by itself? (dump.blind_check_samples=0 skips this check)"
        )
    if result.is_blind_to_turns:
        raise StillhouseError(
            f"the teacher ignores orientation: with pictures turned upside down no answer's distribution "
            f"moved by more than {result.turned:.2g}, expected more than {result.limit:.2g}; are its vision weights "
            "loaded whole? (dump.blind_check_samples=0 skips this check)"
        )
    return result


def _find_greatest_change(one: dict[str, Tensor], other: dict[str, Tensor]) -> float | None:
    """Returns the largest change over the samples that both have; None if there are none."""
    return max((_compute_total_variation(one[key], other[key]) for key in one.keys() & other.keys()), default=None)


def _is_changed_by_turning(image: LoadedImage) -> bool:
    return rotate_picture(image.pixels).tobytes() != image.pixels.tobytes()


def _change_images(sample: PreparedSample, change: Callable[[LoadedImage], LoadedImage]) -> PreparedSample:
    return replace(sample, images=tuple(change(image) for image in sample.images))


def _turn_image(image: LoadedImage) -> LoadedImage:
    """Turns the picture upside down, under a key that no file has."""
    return replace(image, pixels=rotate_picture(image.pixels), sha256=f"turned {image.sha256}")


def _mark_image(settings: PixelSettings, image: LoadedImage) -> LoadedImage:
    """Reads the picture from a file that holds it upside down with an EXIF mark, under a key of its own."""
    content = encode_picture(rotate_picture(image.pixels), "png", is_upside_down=True)
    return replace(image, pixels=make_pixels(content, settings), sha256=f"marked {image.sha256}")


def _swap_images(samples: Sequence[PreparedSample]) -> list[PreparedSample]:
    """Replaces each image of the samples by the content of the next different one, resized."""
    pool = {image.sha256: image for sample in samples for image in sample.images}
    following = dict(zip(pool, [*list(pool)[1:], *list(pool)[:1]], strict=True))
    return [
        replace(
            sample,
            images=tuple(_replace_image(image, pool[following[image.sha256]]) for image in sample.images),
        )
        for sample in samples
    ]


def _replace_image(image: LoadedImage, other: LoadedImage) -> LoadedImage:
    """Returns the other's pixels, or the image inverted if there is no other, under a key that no file has."""
    if other.sha256 == image.sha256:
        return replace(image, pixels=invert_picture(image.pixels), sha256=f"inverted {image.sha256}")
    pixels = resize_picture(other.pixels, image.pixels.size)
    return replace(image, pixels=pixels, sha256=f"{other.sha256} as {image.sha256}")


def _compute_answers(scorer: PartScorer, head: OutputHead, samples: Sequence[PreparedSample]) -> dict[str, Tensor]:
    """Computes probabilities of the response rows by sample id, (r, v); drops samples with infinite states."""
    return {
        sample.record.sample_id: head.logits(states[torch.from_numpy(sample.response_positions)]).softmax(dim=-1)
        for sample, states in scorer.hidden_states(samples).accepted
        if bool(torch.isfinite(states).all())
    }


def _compute_total_variation(one: Tensor, other: Tensor) -> float:
    """Returns the total variation of the row that differs most."""
    return float((one - other).abs().sum(dim=-1).max() / 2)
