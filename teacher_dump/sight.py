"""Sight: proves that a teacher looks at its images before it is asked anything that costs.

A teacher whose vision weights were silently not loaded still answers. Source: KDFlow issue 9 (RECIPES §4).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import ImageOps
from torch import Tensor

from storage.errors import StillhouseError
from storage.records import SampleError
from teacher_dump.head import OutputHead
from teacher_dump.images import LoadedImage
from teacher_dump.preparation import Prepared
from teacher_dump.samples import Sample
from teacher_dump.scoring import PartScorer

_LEAST_CHANGE = 1e-3  # total variation of the most changed row; a teacher that sees gives 0.01 to 1
_NOISE_FACTOR = 4.0  # times the difference between two runs of the same samples


@dataclass(frozen=True)
class Sight:
    """How far the teacher's answers moved: total variation of the most changed response row, 0 to 1."""

    num_samples: int
    change: float  # images swapped
    noise: float  # nothing swapped, the samples in another order

    @property
    def is_blind(self) -> bool:
        return self.change <= max(_LEAST_CHANGE, _NOISE_FACTOR * self.noise)


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


def check_sight(scorer: PartScorer, head: OutputHead, samples: Sequence[Sample]) -> Sight | None:
    """Swap the images between samples and see that the answers' distributions change.

    None where no sample can be scored. StillhouseError: the teacher is blind.
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
    sight = Sight(
        num_samples=len(shared),
        change=max(_total_variation(plain[key], swapped[key]) for key in shared),
        noise=max(_total_variation(plain[key], again[key]) for key in shared),
    )
    logging.getLogger(__name__).info("blind check: %s", sight)
    if sight.is_blind:
        raise StillhouseError(
            f"the teacher is blind: with the images of {sight.num_samples} samples swapped, no answer's "
            f"distribution moved by more than {sight.change:.2g} (the same samples asked twice differ by "
            f"{sight.noise:.2g}); are its vision weights loaded? (dump.blind_check_samples=0 skips this check)"
        )
    return sight


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
        return replace(image, pixels=ImageOps.invert(image.pixels), sha256=f"inverted {image.sha256}")
    return replace(image, pixels=other.pixels.resize(image.pixels.size), sha256=f"{other.sha256} as {image.sha256}")


def _answers(scorer: PartScorer, head: OutputHead, samples: Sequence[Prepared]) -> dict[str, Tensor]:
    """Probabilities of the response rows by sample id, (r, v); without samples whose states are not finite."""
    taken, hidden = scorer.hidden_states(samples, [])
    return {
        sample.record.sample_id: head.logits(states[torch.from_numpy(sample.response_positions)]).softmax(dim=-1)
        for sample, states in zip(taken, hidden, strict=True)
        if bool(torch.isfinite(states).all())
    }


def _total_variation(one: Tensor, other: Tensor) -> float:
    """Of the row that differs most."""
    return float((one - other).abs().sum(dim=-1).max() / 2)
