"""Collects the facts of a cache: identity, sizes of families, errors, error summaries, bytes saved by image keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CacheError
from storage.layout.documents import EngineCheckEntry
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
    """Bytes saved because an image's signals are stored once for each image key, however many samples name it."""

    num_named: int  # images of samples, a shared one counted for each sample
    num_stored: int  # image keys
    saved_bytes_by_family: dict[str, int]  # estimated by the mean bytes of a visual token

    @property
    def saved_bytes(self) -> int:
        """Over all families."""
        return sum(self.saved_bytes_by_family.values())


@dataclass(frozen=True)
class FamilyErrors:
    """The error that one step between teacher and cache adds to a family's rows, as the commits state it."""

    family: str
    kind: str  # teacher_noise, selection_errors, dropped_mass, errors_by_family (the codec): see FORMAT.md
    measure: str
    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class BudgetResult:
    """The threshold that a fidelity budget chose for a family, its prediction, and the result."""

    family: str
    target: str  # gradient_error 0.02, or bytes_per_row 30
    tau: float
    predicted_gradient_error: float  # of the proxy student
    predicted_bytes_per_row: float
    bytes_per_row: float | None  # None without rows


@dataclass(frozen=True)
class CacheFacts:
    """Everything that `stillhouse inspect` shows of a cache without a sample."""

    path: str
    sealed: bool
    num_parts: int  # committed
    num_planned_parts: int
    segments: dict[str, str]  # what each dump wrote
    engine_checks: dict[str, str]  # what each dump knew of its engine; without those that had no check
    num_samples: int
    num_samples_by_split: dict[str, int]
    num_bytes: int
    families: dict[str, FamilySize]
    image_sharing: ImageSharing
    error_summaries: tuple[FamilyErrors, ...]
    budgets: tuple[BudgetResult, ...]
    errors: dict[str, str]  # by sample id, the reason why a planned sample has no record
    identity: dict[str, Any]


def collect_facts(cache: Cache) -> CacheFacts:
    """The facts of a cache, from its commits and its index of samples. Decodes no signal."""
    statistics = cache.statistics()
    sharing, num_keys = _measure_sharing(cache, statistics["bytes_by_family"])
    num_rows = {"tokens": cache.num_samples, "relation": num_keys, **statistics["num_rows"]}
    families = {name: FamilySize(num_rows.get(name), size) for name, size in statistics["bytes_by_family"].items()}
    return CacheFacts(
        path=str(cache.folder),
        sealed=cache.sealed,
        num_parts=statistics["num_parts"],
        num_planned_parts=sum(segment.num_parts for segment in select_tokens_segments(cache.segments)),
        segments={f"segment {segment.number}": _describe_segment(segment) for segment in cache.segments},
        engine_checks={
            f"engine of segment {number}": describe_engine_check(entry)
            for number, entry in cache.engine_checks().items()
        },
        num_samples=cache.num_samples,
        num_samples_by_split={split: cache.splits.count(split) for split in sorted(set(cache.splits))},
        num_bytes=statistics["bytes"],
        families=families,
        image_sharing=sharing,
        error_summaries=tuple(
            FamilyErrors(family, kind, *(summary[name] for name in ("measure", "mean", "p99", "max")))
            for kind in KINDS
            for family, summary in statistics[kind].items()
        ),
        budgets=tuple(_read_budgets(cache, families)),
        errors={error.sample_id: error.reason for error in cache.errors},
        identity=cache.identity.model_dump(mode="json"),
    )


def _read_budgets(cache: Cache, families: dict[str, FamilySize]) -> Iterator[BudgetResult]:
    for family, setting in cache.identity.selection.items():
        budget = setting.get("budget")
        if budget is not None and family in families:
            target = next(name for name in ("gradient_error", "bytes_per_row") if name in budget)
            predicted = budget["predicted"]
            yield BudgetResult(
                family,
                f"{target} {budget[target]:g}",
                setting["tau"],
                predicted["gradient_error"],
                predicted["bytes_per_row"],
                families[family].bytes_per_row,
            )


def _describe_segment(segment: Segment) -> str:
    stored, parts = ", ".join(segment.stored_families), segment.parts
    added = "" if segment.adds_to is None else f", added to segment {segment.adds_to}"
    if segment.retries is not None:
        added = f", of samples that had failed in segment {segment.retries}"
    return f"{stored} of parts {parts.start} to {parts.stop - 1}{added}"


def describe_engine_check(entry: EngineCheckEntry) -> str:
    """What a manifest says of its dump's engine, in one line."""
    means = [
        f"{family} {summary.measure} {summary.mean:.2g}"
        for family, summaries in entry.families.items()
        for summary in summaries
    ]
    figures = f"; {', '.join(means)} in the mean of {entry.num_samples} samples" if means else ""
    if entry.state == "off":
        return f"not required to be checked (dump.engine_check: false){figures}"
    return f"checked: {entry.engine} against {entry.model} in {entry.dtype}, KL of at most {entry.max_kl:g}{figures}"


def convert_facts(facts: CacheFacts) -> dict[str, Any]:
    """The facts in JSON types, with derived numbers such as bytes a row."""
    document = asdict(facts)
    for name, family in facts.families.items():
        document["families"][name]["bytes_per_row"] = family.bytes_per_row
    document["image_sharing"]["saved_bytes"] = facts.image_sharing.saved_bytes
    return document


def find_least_sure(cache: Cache, count: int) -> list[tuple[int, float]]:
    """Positions and mean entropies (nats a token) of the `count` samples with the largest mean entropy, worst first.

    Leaves out samples without an answer. Reads only the entropy column. CacheError without the family response.
    """
    if "response" not in cache.families:
        raise CacheError(f"{cache.folder}: holds no response rows, which carry the teacher's entropy")
    lists = [chunk for table in cache.tables("response", ["entropy"]) for chunk in table["entropy"].chunks]
    means = np.concatenate([np.zeros(0), *map(_average_lists, lists)])
    order = np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")
    return [(int(index), float(means[index])) for index in order[:count] if np.isfinite(means[index])]


def _average_lists(lists: Any) -> NDArray[np.float64]:
    """The mean of each list of an Arrow list array; NaN for an empty list."""
    lengths = lists.value_lengths().to_numpy()
    values = lists.flatten().to_numpy().astype(np.float64)
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, minlength=len(lengths))
    return np.where(lengths > 0, sums / np.maximum(lengths, 1), np.nan)


def _measure_sharing(cache: Cache, bytes_by_family: dict[str, int]) -> tuple[ImageSharing, int]:
    """The savings by shared image keys, and the number of image keys."""
    num_tokens_by_key: dict[str, int] = {}
    named_tokens = num_named = 0
    for key, num_tokens in _list_images(cache):
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


def _list_images(cache: Cache) -> Iterator[tuple[str, int]]:
    """Key and number of visual tokens of every image of every sample."""
    for table in cache.tables("tokens", ["image_keys", "image_visual_tokens"]):
        columns = (table[name].to_pylist() for name in ("image_keys", "image_visual_tokens"))
        for keys, num_tokens in zip(*columns, strict=True):
            yield from zip(keys, num_tokens, strict=True)
