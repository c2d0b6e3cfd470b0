"""Weights that turn sums over rows into means: over rows, samples or micro-batches of a global batch.

Ranges of a micro-batch's rows get one weight each. The weighted sums of all ranges of a global batch add up to its
mean: over rows, over the means of samples, or over the means of micro-batches, as in published scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from student_train.losses.config import Mean
from student_train.losses.row_counts import RowCounts


@dataclass(frozen=True)
class WeightedRows:
    """The rows start : stop of a micro-batch, and the weight of their sum."""

    start: int
    stop: int
    weight: float

    @property
    def rows(self) -> slice:
        """These rows, as an index of tensors and of teacher rows."""
        return slice(self.start, self.stop)


def weigh_rows(mean: Mean, counts: Sequence[int], *, total_rows: int, totals: RowCounts) -> list[WeightedRows]:
    """Split a micro-batch whose samples have `counts` rows into weighted ranges; at least one, perhaps empty.

    `total_rows`: rows of this loss in the global batch. `totals`: its samples and micro-batches, including those
    without a row of this loss, which therefore add 0 to a mean.
    """
    num_rows = sum(counts)
    if mean == "rows":
        return [WeightedRows(0, num_rows, 1 / max(1, total_rows))]
    if mean == "micro_batch":
        return [WeightedRows(0, num_rows, 1 / (max(1, num_rows) * max(1, totals.micro_batches)))]
    shares, start = [], 0
    for count in counts:
        if count:
            shares.append(WeightedRows(start, start + count, 1 / (count * max(1, totals.samples))))
        start += count
    return shares or [WeightedRows(0, 0, 1.0)]


def weigh_images(mean: Mean, counts: Sequence[int], *, totals: RowCounts) -> list[float]:
    """Return the weight of each image's relation loss in a micro-batch whose samples have `counts` images."""
    if mean == "rows":
        return [1 / max(1, totals.relation)] * sum(counts)
    if mean == "micro_batch":
        return [1 / (max(1, sum(counts)) * max(1, totals.micro_batches))] * sum(counts)
    return [1 / (count * max(1, totals.samples)) for count in counts for _ in range(count)]
