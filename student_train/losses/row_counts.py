"""Numbers of rows that losses are averaged over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCounts:
    """Number of rows of each loss in a set of samples; `relation` counts images."""

    response: int
    visual: int
    relation: int
    samples: int = 0  # or pairs
    micro_batches: int = 0  # of a global batch: micro-batches of all ranks that hold samples
