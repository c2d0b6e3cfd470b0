"""Chooses the samples that the engine check scores, and the rows of each.

Legend: r response rows, n visual rows of one image.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from teacher_dump.data.sample import Sample

if TYPE_CHECKING:  # imports the image loader, which a dump over a complete cache does not need
    from teacher_dump.prompts.preparation import PreparedSample

Kind = Literal["several images", "one image", "text"]
KINDS: tuple[Kind, ...] = ("several images", "one image", "text")

MAX_RESPONSE_ROWS = 256  # of a sample, evenly spread
MAX_IMAGES = 4  # of a sample whose visual rows are compared
MAX_VISUAL_ROWS = 64  # of an image, evenly spread; all where relation matrices are compared


@dataclass(frozen=True)
class CheckTask:
    """The samples that engine and model score, and what is compared."""

    samples: tuple[Sample, ...]
    relation_centered: bool | None = None  # None: relation matrices are not compared


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """The positions in the expanded prompt whose hidden states are compared."""

    response: NDArray[np.int64]  # (r,) that predict a response token
    labels: NDArray[np.int64]  # (r,) those tokens
    visual: tuple[NDArray[np.int64], ...]  # (n,) by image


def classify_sample(sample: Sample) -> Kind:
    """Returns the kind of a sample, by its number of images."""
    if len(sample.images) > 1:
        return "several images"
    return "one image" if sample.images else "text"


def choose_slice(samples: Iterable[Sample], num_samples: int) -> tuple[Sample, ...]:
    """Chooses `num_samples` samples, an equal share of each kind that the samples have.

    Deterministic: within a kind, those whose ids have the smallest sha256, wherever they stand in the data.
    """
    heaps: dict[Kind, list[tuple[int, str, Sample]]] = {kind: [] for kind in KINDS}
    for sample in samples:
        heap = heaps[classify_sample(sample)]
        rank = -int.from_bytes(hashlib.sha256(sample.id.encode("utf-8", "backslashreplace")).digest())
        if len(heap) < num_samples:
            heapq.heappush(heap, (rank, sample.id, sample))
        elif rank > heap[0][0]:
            heapq.heapreplace(heap, (rank, sample.id, sample))
    ordered = [[sample for _, _, sample in sorted(heap, reverse=True)] for heap in heaps.values()]
    chosen: list[Sample] = []
    for place in range(num_samples):
        chosen += [of_kind[place] for of_kind in ordered if place < len(of_kind)]
    return tuple(chosen[:num_samples])


def select_checked_rows(sample: PreparedSample, *, whole_images: bool) -> CheckedRows:
    """Selects at most MAX_RESPONSE_ROWS response rows, and visual rows of at most MAX_IMAGES images."""
    response = _spread(sample.response_positions, MAX_RESPONSE_ROWS)
    labels = sample.record.token_ids[sample.record.response_mask].astype(np.int64)
    visual = sample.expansion.visual[:MAX_IMAGES]
    return CheckedRows(
        response,
        _spread(labels, MAX_RESPONSE_ROWS),
        tuple(positions if whole_images else _spread(positions, MAX_VISUAL_ROWS) for positions in visual),
    )


def _spread(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Returns at most `most` values, evenly spread over all."""
    count = min(len(values), most)
    return values[np.arange(count) * len(values) // max(count, 1)]
