"""Forecasts bytes and time of a whole dump from a slice that was scored and encoded. Pure functions.

The text and the images of every sample are known beforehand. The slice shows what they become (tokens, rows,
distinct images), which is scaled up: text by characters, images by their number. The slice is encoded as one part
and as two halves, which separates the fixed cost of a part (its table of id groups, its footers) from the cost per
row. Time is measured with prompts, teacher and encoding running concurrently, as in a worker: how much they slow
each other down cannot be computed from their separate times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.encoding.parquet_schema import FAMILIES
from teacher_dump.data.sample import Sample

if TYPE_CHECKING:
    from teacher_dump.prompts.data_report import DataReport

_UNITS = {  # the field of Work that a family's bytes are proportional to
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
class SampleCounts:
    """Counts of samples, characters and images, known without a tokenizer."""

    samples: int
    characters: int  # of all turns
    images: int  # distinct paths
    image_places: int  # images of all samples, shared images counted each time

    @staticmethod
    def count(samples: Iterable[Sample]) -> SampleCounts:
        """Counts samples, their characters and their images."""
        num_samples = characters = places = 0
        images: set[str] = set()
        for sample in samples:
            num_samples += 1
            characters += sum(len(turn.text) for turn in sample.turns)
            places += len(sample.images)
            images.update(sample.images)
        return SampleCounts(num_samples, characters, len(images), places)


@dataclass(frozen=True)
class Work:
    """Tokens, rows and images that samples become. Floats, since a forecast holds expectations."""

    samples: float  # with a record
    text_tokens: float  # one placeholder an image
    visual_tokens: float  # positions of images in prompts, shared images counted each time
    response_rows: float
    visual_rows: float  # of distinct images
    images: float  # distinct image keys, which include the prefix

    @property
    def tokens(self) -> float:
        """Positions that the teacher scores."""
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True)
class SliceCost:
    """Samples encoded as one part: the work and the bytes of its files."""

    work: Work
    family_bytes: Mapping[str, int]  # of each file


@dataclass(frozen=True)
class Calibration:
    """Measurements of a slice of a plan, on the hardware of the dump."""

    counts: SampleCounts
    whole: SliceCost
    halves: tuple[SliceCost, ...]
    seconds: Mapping[str, float]  # of `whole`: prompts alone, encoding alone; scoring with both running concurrently
    start_s: float  # until Ray and a teacher were ready
    num_errors: int  # samples of the slice without a record
    head_bytes: int = 0  # of the output head, which a cache of hidden states stores once


@dataclass(frozen=True)
class Forecast:
    """Expected size and time of a whole dump."""

    parts: int
    samples: int
    tokens: int
    rows: Mapping[str, int]  # response, visual
    family_bytes: Mapping[str, int]
    stage_s: Mapping[str, float]  # sum over actors: prompts alone, encoding alone, scoring with both concurrently
    scoring_s: float  # wall time as in dump.json: from the start of the first part to the last commit
    start_s: float  # until Ray and a teacher are ready, before scoring
    calibration_samples: int
    calibration_errors: int
    data: DataReport | None = None  # about the slice's samples, and all samples that cannot be read

    @property
    def total_bytes(self) -> int:
        return sum(self.family_bytes.values())


def forecast(calibration: Calibration, counts: SampleCounts, *, num_parts: int, num_actors: int) -> Forecast:
    """Forecasts a dump of the samples in `counts`. Raises ValueError if no sample of the slice has a record."""
    if calibration.whole.work.samples == 0:
        raise ValueError("none of the samples that were tried has a record")
    work = _scale_work(calibration.whole.work, calibration.counts, counts)
    family_bytes = {
        family: round(_forecast_family_bytes(family, calibration, work, num_parts))
        for family in FAMILIES
        if family in calibration.whole.family_bytes
    }
    if calibration.head_bytes:
        family_bytes["head"] = calibration.head_bytes
    stage_s = {
        stage: calibration.seconds[stage] * _divide(getattr(work, unit), getattr(calibration.whole.work, unit))
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
        calibration_samples=calibration.counts.samples,
        calibration_errors=calibration.num_errors,
    )


def _scale_work(work: Work, some: SampleCounts, every: SampleCounts) -> Work:
    text = _divide(every.characters, some.characters)
    images, places = _divide(every.images, some.images), _divide(every.image_places, some.image_places)
    return Work(
        samples=work.samples * every.samples / some.samples,
        text_tokens=work.text_tokens * text,
        visual_tokens=work.visual_tokens * places,
        response_rows=work.response_rows * text,
        visual_rows=work.visual_rows * images,
        images=work.images * images,
    )


def _forecast_family_bytes(family: str, calibration: Calibration, work: Work, num_parts: int) -> float:
    """Forecasts a family's bytes for equal parts, on the line through the slice and its halves."""
    whole, unit = calibration.whole, _UNITS[family]
    units, found = getattr(whole.work, unit), whole.family_bytes[family]
    half_units = _mean([getattr(half.work, unit) for half in calibration.halves])
    half_bytes = _mean([half.family_bytes[family] for half in calibration.halves])
    slope = _divide(found - half_bytes, units - half_units) if units > half_units else 0.0
    slope = min(max(slope, 0.0), _divide(found, units))  # a part itself costs nothing or something
    return num_parts * (found - slope * units) + slope * getattr(work, unit)


def _divide(amount: float, of: float) -> float:
    return amount / of if of else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
