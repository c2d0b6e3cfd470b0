"""What a cache is, in numbers: identity, sizes of families, errors, what was lost, what storing by image key saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheError
from storage.layout.error_summaries import KINDS
from storage.layout.segments import Segment, select_tokens_segments
from storage.reader.cache import Cache

IMAGE_FAMILIES = ("visual", "relation")


@dataclass(frozen=True)
class FamilySize:
    """One family on disk. Its rows: samples (tokens), distributions (response, visual), matrices (relation)."""

    num_rows: int | None  # None for a family that counts otherwise
    num_bytes: int

    @property
    def bytes_per_row(self) -> float | None:
        """None without rows, or without their number."""
        return self.num_bytes / self.num_rows if self.num_rows else None


@dataclass(frozen=True)
class ImageSharing:
    """Signals of images are stored once an image key, however many samples name it."""

    num_named: int  # images over all samples
    num_stored: int  # image keys
    saved_bytes_by_family: dict[str, int]  # more bytes without sharing, each visual token at its family's mean

    @property
    def saved_bytes(self) -> int:
        """Over all families."""
        return sum(self.saved_bytes_by_family.values())


@dataclass(frozen=True)
class Loss:
    """What one step between teacher and cache cost a family's rows, as the commits state it."""

    family: str
    kind: str  # teacher_noise, selection_errors, dropped_mass, errors_by_family (the codec): see FORMAT.md
    measure: str
    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Budget:
    """What a fidelity budget chose for a family, and how its prediction compares."""

    family: str
    asked: str  # gradient_error 0.02, or bytes_per_row 30
    tau: float
    predicted_gradient_error: float  # of the proxy student
    predicted_bytes_per_row: float
    bytes_per_row: float | None  # real; None without rows


@dataclass(frozen=True)
class CacheFacts:
    """What `stillhouse inspect` tells of a cache."""

    path: str
    sealed: bool
    num_parts: int  # committed
    num_planned_parts: int
    segments: dict[str, str]  # what each dump wrote
    num_samples: int
    num_samples_by_split: dict[str, int]
    num_bytes: int
    families: dict[str, FamilySize]
    image_sharing: ImageSharing
    losses: tuple[Loss, ...]
    budgets: tuple[Budget, ...]
    errors: dict[str, str]  # why a sample of the plan has no record, by its id
    identity: dict[str, Any]


def cache_facts(cache: Cache) -> CacheFacts:
    """Facts from the commits and the tokens' index; no signal is decoded."""
    statistics = cache.statistics()
    sharing, num_keys = _sharing(cache, statistics["bytes_by_family"])
    num_rows = {"tokens": cache.num_samples, "relation": num_keys, **statistics["num_rows"]}
    families = {name: FamilySize(num_rows.get(name), size) for name, size in statistics["bytes_by_family"].items()}
    return CacheFacts(
        path=str(cache.folder),
        sealed=cache.sealed,
        num_parts=statistics["num_parts"],
        num_planned_parts=sum(segment.num_parts for segment in select_tokens_segments(cache.segments)),
        segments={f"segment {segment.number}": _describe(segment) for segment in cache.segments},
        num_samples=cache.num_samples,
        num_samples_by_split={split: cache.splits.count(split) for split in sorted(set(cache.splits))},
        num_bytes=statistics["bytes"],
        families=families,
        image_sharing=sharing,
        losses=tuple(
            Loss(family, kind, *(one[name] for name in ("measure", "mean", "p99", "max")))
            for kind in KINDS
            for family, one in statistics[kind].items()
        ),
        budgets=tuple(_budgets(cache, families)),
        errors={error.sample_id: error.reason for error in cache.errors},
        identity=cache.identity.model_dump(mode="json"),
    )


def _budgets(cache: Cache, families: dict[str, FamilySize]) -> Iterator[Budget]:
    for family, setting in cache.identity.selection.items():
        budget = setting.get("budget")
        if budget is not None and family in families:
            asked = next(name for name in ("gradient_error", "bytes_per_row") if name in budget)
            predicted = budget["predicted"]
            yield Budget(
                family,
                f"{asked} {budget[asked]:g}",
                setting["tau"],
                predicted["gradient_error"],
                predicted["bytes_per_row"],
                families[family].bytes_per_row,
            )


def _describe(segment: Segment) -> str:
    stored, parts = ", ".join(segment.stored_families), segment.parts
    added = "" if segment.adds_to is None else f", added to segment {segment.adds_to}"
    if segment.retries is not None:
        added = f", of samples that had failed in segment {segment.retries}"
    return f"{stored} of parts {parts.start} to {parts.stop - 1}{added}"


def as_json(facts: CacheFacts) -> dict[str, Any]:
    """The facts in JSON types, with the derived numbers."""
    document = asdict(facts)
    for name, family in facts.families.items():
        document["families"][name]["bytes_per_row"] = family.bytes_per_row
    document["image_sharing"]["saved_bytes"] = facts.image_sharing.saved_bytes
    return document


def least_sure(cache: Cache, count: int) -> list[tuple[int, float]]:
    """Positions and mean entropies (nats a token) of the answers on which the teacher was least sure, worst first.

    Samples without an answer are left out. Reads the entropy column alone. CacheError without the family response.
    """
    if "response" not in cache.families:
        raise CacheError(f"{cache.folder}: holds no response rows, so nobody knows how sure the teacher was")
    lists = [chunk for table in cache.tables("response", ["entropy"]) for chunk in table["entropy"].chunks]
    means = np.concatenate([np.zeros(0), *map(_means, lists)])
    order = np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")
    return [(int(index), float(means[index])) for index in order[:count] if np.isfinite(means[index])]


def _means(lists: Any) -> NDArray[np.float64]:
    """The mean of each list of an Arrow list array; NaN of an empty one."""
    lengths = lists.value_lengths().to_numpy()
    values = lists.flatten().to_numpy().astype(np.float64)
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, minlength=len(lengths))
    return np.where(lengths > 0, sums / np.maximum(lengths, 1), np.nan)


def _sharing(cache: Cache, bytes_by_family: dict[str, int]) -> tuple[ImageSharing, int]:
    num_tokens_by_key: dict[str, int] = {}
    named_tokens = num_named = 0
    for key, num_tokens in _named_images(cache):
        num_tokens_by_key[key] = num_tokens
        named_tokens += num_tokens
        num_named += 1
    stored_tokens = max(1, sum(num_tokens_by_key.values()))
    saved = {
        family: round(bytes_by_family[family] * (named_tokens / stored_tokens - 1))
        for family in IMAGE_FAMILIES
        if family in bytes_by_family and num_named
    }
    return ImageSharing(num_named, len(num_tokens_by_key), saved), len(num_tokens_by_key)


def _named_images(cache: Cache) -> Iterator[tuple[str, int]]:
    """Key and visual tokens of every image that a sample names."""
    for table in cache.tables("tokens", ["image_keys", "image_visual_tokens"]):
        for keys, num_tokens in zip(
            table["image_keys"].to_pylist(), table["image_visual_tokens"].to_pylist(), strict=True
        ):
            yield from zip(keys, num_tokens, strict=True)
