"""Rounds probabilities to steps of their square roots, at random, so that the mean is the probability.

No entry exceeds its row's most probable entry, the first choice; if others get the same level, the
position of the first choice among them is recorded. FORMAT.md has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.encoding.row_block_header import WIDE_LEVEL, level_type
from storage.records.sparse_rows import SparseRows

_LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)  # so that no entry is decoded to 0
_LEAST_STEP, _LARGEST_STEP = 1 / WIDE_LEVEL, 1 / 16


@dataclass(frozen=True, eq=False)
class Head:
    """The exact entries of some rows, sorted by rank within each row."""

    logprobs: NDArray[np.float32]
    row: NDArray[np.int64]
    is_first: NDArray[np.bool_]  # the most probable entry of its row
    num_rows: int


def choose_step(rows: SparseRows, rounding_kl: float) -> float:
    """Returns the step of sqrt(p) whose rounding costs `rounding_kl` nats per row on average.

    Rounding e entries costs e * step^2 / 3. Returns 0 (no rounding) if `rounding_kl` is 0.
    """
    if rounding_kl == 0 or rows.num_rows == 0:
        return 0.0
    entries = max(1.0, float(rows.num_exact.mean()))
    step = np.sqrt(3 * rounding_kl / entries)
    return float(np.float32(np.clip(step, _LEAST_STEP, _LARGEST_STEP)))


def round_head(head: Head, step: float, seed: int) -> tuple[float, NDArray, NDArray[np.float64]]:
    """Returns the probability of level 0, the values as stored in a block, and (r,) each row's KL cost."""
    if step == 0:
        return 0.0, head.logprobs.astype("<f4"), np.zeros(head.num_rows)
    row, num_rows = head.row, head.num_rows
    probs = np.maximum(np.exp(head.logprobs.astype(np.float64)), _LEAST_PROBABILITY)
    kind, max_level = level_type(step)
    below = np.minimum(np.floor(np.sqrt(probs) / step), max_level - 1).astype(np.int64)
    low = below == 0
    lowest = max(_float32_below(float(probs[low].min())), _LEAST_PROBABILITY) if low.any() else 0.0
    table = level_table(step, lowest)
    share = np.clip((probs - table[below]) / (table[below + 1] - table[below]), 0, 1)  # of the step that lies below
    levels = below + _rounds_up(head, below, share, seed)
    decoded = table[levels]
    mass = np.bincount(row, probs, num_rows)
    ratio = np.divide(mass, np.bincount(row, decoded, num_rows), out=np.ones(num_rows), where=mass > 0)
    divergence = np.bincount(row, probs * np.log(probs / (decoded * ratio[row])), num_rows)
    return lowest, levels.astype(kind), np.maximum(divergence, 0.0)


def _rounds_up(head: Head, below: NDArray[np.int64], share: NDArray[np.float64], seed: int) -> NDArray[np.bool_]:
    """Draws True for each entry with probability `share`, such that none exceeds its row's first choice.

    Entries in the same step as the first choice are rounded up only if it is, with probability share / its
    share; so each still has the probability `share`. All other entries are drawn independently.
    """
    uniforms = np.random.Generator(np.random.PCG64(seed)).random(len(share))
    up = uniforms < share
    first = np.zeros(head.num_rows, np.int64)  # of each row the first choice's entry
    first[head.row[head.is_first]] = np.flatnonzero(head.is_first)
    of_row = first[head.row]
    beside = ~head.is_first & (below == below[of_row])
    bound = share[of_row[beside]]
    up[beside] = up[of_row[beside]] & (uniforms[beside] * bound < share[beside])
    return up


def level_table(step: float, lowest: float) -> NDArray[np.float64]:
    """Returns the probability of each level."""
    table = (np.arange(level_type(step)[1] + 1, dtype=np.float64) * step) ** 2
    table[0] = lowest
    return table


def _float32_below(value: float) -> float:
    """Returns the largest float32 that is not above `value`."""
    rounded = np.float32(value)
    return float(rounded if rounded <= value else np.nextafter(rounded, np.float32(0)))


def places_of_first(head: Head, values: NDArray, ids: NDArray[np.int32], step: float) -> NDArray[np.int64]:
    """Returns (r,) how many entries precede a row's first choice by descending value, then id; 0 if empty."""
    falling = np.abs(values).view(np.uint32) if step == 0 else level_type(step)[1] - values
    first_ids, first_falling = np.zeros(head.num_rows, np.int64), np.zeros(head.num_rows, np.int64)
    row = head.row[head.is_first]
    first_ids[row], first_falling[row] = ids[head.is_first], falling[head.is_first]
    tied = falling == first_falling[head.row]  # none falls less: see _rounds_up
    before = tied & (ids < first_ids[head.row])
    return np.bincount(head.row[before], minlength=head.num_rows)


def count_ties(falling: NDArray, num_exact: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns (r,) how many entries are as probable as a row's most probable one; 0 if the row is empty."""
    starts = (np.cumsum(num_exact, dtype=np.int64) - num_exact)[num_exact > 0]
    if not len(starts):
        return np.zeros(len(num_exact), np.int64)
    ties = np.zeros(len(num_exact), np.int64)
    least = np.minimum.reduceat(falling, starts)
    equal = falling == np.repeat(least, num_exact[num_exact > 0])
    ties[num_exact > 0] = np.add.reduceat(equal, starts, dtype=np.int64)
    return ties
