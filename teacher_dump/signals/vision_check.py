"""Sight: proves that a teacher looks at its images before it is asked anything that costs.

A teacher whose vision weights were silently not loaded still answers. Source: KDFlow issue 9 (RECIPES §4).
Three questions: the samples with their images swapped, the samples again in another order, and the samples turned: a
file that says it lies upside down must be answered as the upright picture, and otherwise than the picture upside down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from storage.errors import StillhouseError
from storage.images.pictures import encode_picture, invert_picture, resize_picture, turn_picture
from storage.images.pixels import make_pixels
from storage.images.settings import PixelSettings
from storage.records.records import SampleError
from teacher_dump.data.image_loading import LoadedImage
from teacher_dump.data.sample import Sample
from teacher_dump.prompts.preparation import Prepared
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.scoring import PartScorer

_LEAST_CHANGE = 1e-3  # total variation of the most changed row; a teacher that sees gives 0.01 to 1
_NOISE_FACTOR = 4.0  # times the difference between two runs of the same samples


@dataclass(frozen=True)
class Sight:
    """How far the teacher's answers moved: total variation of the most changed response row, 0 to 1."""

    num_samples: int
    change: float  # images swapped
    noise: float  # nothing swapped, the samples in another order
    marked: float | None = None  # files that say they lie upside down, and do; None: turning changes no image
    turned: float | None = None  # pictures upside down

    @property
    def limit(self) -> float:
        """What a change must exceed."""
        return max(_LEAST_CHANGE, _NOISE_FACTOR * self.noise)

    @property
    def is_blind(self) -> bool:
        return self.change <= self.limit

    @property
    def turns_wrongly(self) -> bool:
        """A file's orientation is not applied, or is applied twice."""
        return self.marked is not None and self.marked > self.limit

    @property
    def sees_no_turn(self) -> bool:
        return self.turned is not None and self.turned <= self.limit


def choose_samples(samples: Iterable[Sample], num_samples: int) -> tuple[Sample, ...]:
    """The first samples with images that no earlier one shows."""
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
) -> Sight | None:
    """Swap and turn the images of some samples and see which of their answers' distributions change.

    `pixels`: how a file's bytes become pixels. None where no sample can be scored. StillhouseError: the teacher is
    blind, or sees other pixels than those that were made for it.
    """
    errors: list[SampleError] = []
    ready = scorer.prepare(samples, errors)
    if not ready:
        return None
    plain = _answers(scorer, head, ready)
    swapped = _answers(scorer, head, _swapped(ready))
    again = _answers(scorer, head, ready[::-1])
    shared = plain.keys() & swapped.keys() & again.keys()
    if not shared:
        return None
    turnable = [sample for sample in ready if any(_changes_when_turned(image) for image in sample.images)]
    settings = pixels or PixelSettings()
    marked = _answers(scorer, head, [_each_image(sample, partial(_marked, settings)) for sample in turnable])
    turned = _answers(scorer, head, [_each_image(sample, _turned) for sample in turnable])
    sight = Sight(
        num_samples=len(shared),
        change=_greatest_change(plain, swapped) or 0.0,
        noise=_greatest_change(plain, again) or 0.0,
        marked=_greatest_change(plain, marked),
        turned=_greatest_change(plain, turned),
    )
    logging.getLogger(__name__).info("blind check: %s", sight)
    if sight.is_blind:
        raise StillhouseError(
            f"the teacher is blind: with the images of {sight.num_samples} samples swapped, no answer's "
            f"distribution moved by more than {sight.change:.2g} (the same samples asked twice differ by "
            f"{sight.noise:.2g}); are its vision weights loaded? (dump.blind_check_samples=0 skips this check)"
        )
    if sight.turns_wrongly:
        raise StillhouseError(
            f"the teacher sees other pixels than were made for it: a file whose EXIF says that it lies upside down "
            f"moved an answer's distribution by {sight.marked:.2g} from that of the upright picture (the same samples "
            f"asked twice differ by {sight.noise:.2g}); expected no more than {sight.limit:.2g}. Does the engine turn "
            "images by itself? (dump.blind_check_samples=0 skips this check)"
        )
    if sight.sees_no_turn:
        raise StillhouseError(
            f"the teacher does not see where things are: with pictures turned upside down no answer's distribution "
            f"moved by more than {sight.turned:.2g}, expected more than {sight.limit:.2g}; are its vision weights "
            "loaded whole? (dump.blind_check_samples=0 skips this check)"
        )
    return sight


def _greatest_change(one: dict[str, Tensor], other: dict[str, Tensor]) -> float | None:
    """Over the samples that both have; None without any."""
    return max((_total_variation(one[key], other[key]) for key in one.keys() & other.keys()), default=None)


def _changes_when_turned(image: LoadedImage) -> bool:
    return turn_picture(image.pixels).tobytes() != image.pixels.tobytes()


def _each_image(sample: Prepared, change: Callable[[LoadedImage], LoadedImage]) -> Prepared:
    return replace(sample, images=tuple(change(image) for image in sample.images))


def _turned(image: LoadedImage) -> LoadedImage:
    """The picture upside down, under a key that no file has."""
    return replace(image, pixels=turn_picture(image.pixels), sha256=f"turned {image.sha256}")


def _marked(settings: PixelSettings, image: LoadedImage) -> LoadedImage:
    """Read from a file that holds the picture upside down and says so: the upright picture, under a key of its own."""
    content = encode_picture(turn_picture(image.pixels), "png", is_upside_down=True)
    return replace(image, pixels=make_pixels(content, settings), sha256=f"marked {image.sha256}")


def _swapped(samples: Sequence[Prepared]) -> list[Prepared]:
    """The samples, each of their images replaced by the content of the next different one, at its own size."""
    pool = {image.sha256: image for sample in samples for image in sample.images}
    following = dict(zip(pool, [*list(pool)[1:], *list(pool)[:1]], strict=True))
    return [
        replace(
            sample,
            images=tuple(_in_place_of(image, pool[following[image.sha256]]) for image in sample.images),
        )
        for sample in samples
    ]


def _in_place_of(image: LoadedImage, other: LoadedImage) -> LoadedImage:
    """The other's pixels, or its own inverted if it is the only one, under a key that no file has."""
    if other.sha256 == image.sha256:
        return replace(image, pixels=invert_picture(image.pixels), sha256=f"inverted {image.sha256}")
    pixels = resize_picture(other.pixels, image.pixels.size)
    return replace(image, pixels=pixels, sha256=f"{other.sha256} as {image.sha256}")


def _answers(scorer: PartScorer, head: OutputHead, samples: Sequence[Prepared]) -> dict[str, Tensor]:
    """Probabilities of the response rows by sample id, (r, v); without samples whose states are not finite."""
    if not samples:
        return {}
    taken, hidden = scorer.hidden_states(samples, [])
    return {
        sample.record.sample_id: head.logits(states[torch.from_numpy(sample.response_positions)]).softmax(dim=-1)
        for sample, states in zip(taken, hidden, strict=True)
        if bool(torch.isfinite(states).all())
    }


def _total_variation(one: Tensor, other: Tensor) -> float:
    """Of the row that differs most."""
    return float((one - other).abs().sum(dim=-1).max() / 2)
