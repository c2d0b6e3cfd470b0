"""The forecast: what a whole dump weighs and takes, from a slice of its samples that was scored and encoded. Pure.

Of every sample its text and its images are known beforehand. What they become (tokens, rows, distinct images) the
slice shows, and so it is scaled up: text by characters, images by how many there are. The slice is encoded as
one part and as two halves, which tells what a part costs by itself (its table of id groups, its footers) from what
each row costs. Time is measured with prompts, teacher and encoding side by side, as a worker has them: how far they
hinder each other on the same cores, and in one Python process, cannot be reckoned from what each takes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.encoding.parquet_schema import FAMILIES
from teacher_dump.data.sample import Sample

if TYPE_CHECKING:
    from teacher_dump.prompts.data_report import DataReport

_UNITS = {  # what a family's bytes grow with, a field of Work
    "tokens": "text_tokens",
    "response": "response_rows",
    "visual": "visual_rows",
    "relation": "images",
    "sequence": "samples",
    "hidden": "response_rows",
    "images": "images",
}
_STAGE_UNITS = {"prompts": "samples", "encoding": "samples", "scoring": "tokens"}


@dataclass(frozen=True)
class Asked:
    """What is known of samples without a tokenizer."""

    samples: int
    characters: int  # of all turns
    images: int  # distinct paths
    image_places: int  # images of all samples, those that are shared counted again

    @staticmethod
    def of(samples: Iterable[Sample]) -> Asked:
        """Counts some samples."""
        num_samples = characters = places = 0
        images: set[str] = set()
        for sample in samples:
            num_samples += 1
            characters += sum(len(turn.text) for turn in sample.turns)
            places += len(sample.images)
            images.update(sample.images)
        return Asked(num_samples, characters, len(images), places)


@dataclass(frozen=True)
class Work:
    """What samples became. Floats: a forecast's are expectations."""

    samples: float  # with a record
    text_tokens: float  # one placeholder an image
    visual_tokens: float  # positions of images in prompts, those of shared images counted again
    response_rows: float
    visual_rows: float  # of distinct images
    images: float  # distinct ones: their prefix counts, too

    @property
    def tokens(self) -> float:
        """Positions that the teacher is asked about."""
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True)
class Slice:
    """Some samples as a part of their own: what they became, and what that cost."""

    work: Work
    family_bytes: Mapping[str, int]  # of each file


@dataclass(frozen=True)
class Calibration:
    """A slice of a plan's samples, measured on the hardware of the dump."""

    asked: Asked
    whole: Slice
    halves: tuple[Slice, ...]
    seconds: Mapping[str, float]  # of `whole`: prompts and encoding alone; scoring is all, teacher too, side by side
    start_s: float  # until Ray and a teacher were ready
    num_errors: int  # samples of the slice without a record
    head_bytes: int = 0  # of the output head, which a cache of hidden states keeps once


@dataclass(frozen=True)
class Forecast:
    """What a whole dump is expected to be."""

    parts: int
    samples: int
    tokens: int
    rows: Mapping[str, int]  # response, visual
    family_bytes: Mapping[str, int]
    stage_s: Mapping[str, float]  # of all actors together: prompts alone, encoding alone, scoring with both beside it
    scoring_s: float  # wall time as dump.json has it: from the first part that is begun to the last commit
    start_s: float  # of Ray and a teacher, before that
    calibration_samples: int
    calibration_errors: int
    data: DataReport | None = None  # of the samples that were tried, and of all that could not be read

    @property
    def total_bytes(self) -> int:
        return sum(self.family_bytes.values())


def forecast(calibration: Calibration, asked: Asked, *, num_parts: int, num_actors: int) -> Forecast:
    """What a dump of the samples in `asked` is expected to be. ValueError: no sample of the slice has a record."""
    if calibration.whole.work.samples == 0:
        raise ValueError("none of the samples that were tried has a record")
    work = _scaled(calibration.whole.work, calibration.asked, asked)
    family_bytes = {
        family: round(_family_bytes(family, calibration, work, num_parts))
        for family in FAMILIES
        if family in calibration.whole.family_bytes
    }
    if calibration.head_bytes:
        family_bytes["head"] = calibration.head_bytes
    stage_s = {
        stage: calibration.seconds[stage] * _per(getattr(work, unit), getattr(calibration.whole.work, unit))
        for stage, unit in _STAGE_UNITS.items()
    }
    return Forecast(
        parts=num_parts,
        samples=round(work.samples),
        tokens=round(work.tokens),
        rows={"response": round(work.response_rows), "visual": round(work.visual_rows)},
        family_bytes=family_bytes,
        stage_s=stage_s,
        scoring_s=stage_s["scoring"] / min(num_actors, max(num_parts, 1)),
        start_s=calibration.start_s,
        calibration_samples=calibration.asked.samples,
        calibration_errors=calibration.num_errors,
    )


def _scaled(work: Work, some: Asked, every: Asked) -> Work:
    text = _per(every.characters, some.characters)
    images, places = _per(every.images, some.images), _per(every.image_places, some.image_places)
    return Work(
        samples=work.samples * every.samples / some.samples,
        text_tokens=work.text_tokens * text,
        visual_tokens=work.visual_tokens * places,
        response_rows=work.response_rows * text,
        visual_rows=work.visual_rows * images,
        images=work.images * images,
    )


def _family_bytes(family: str, calibration: Calibration, work: Work, num_parts: int) -> float:
    """Parts of equal size, on the line through the slice and its halves."""
    whole, unit = calibration.whole, _UNITS[family]
    units, found = getattr(whole.work, unit), whole.family_bytes[family]
    half_units = _mean([getattr(half.work, unit) for half in calibration.halves])
    half_bytes = _mean([half.family_bytes[family] for half in calibration.halves])
    slope = _per(found - half_bytes, units - half_units) if units > half_units else 0.0
    slope = min(max(slope, 0.0), _per(found, units))  # a part itself costs nothing or something
    return num_parts * (found - slope * units) + slope * getattr(work, unit)


def _per(amount: float, of: float) -> float:
    return amount / of if of else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
