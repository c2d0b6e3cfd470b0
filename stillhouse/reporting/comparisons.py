"""Compares runs with their controls, paired by seed and by question: simultaneous intervals and adjusted p values.

A difference of two runs varies with the seed, with the question and with both. Its mean over s seeds and q questions
has the variance V = MS_seed / (s q) + max(0, MS_question - MS_rest) / (s q), mean squares of a two-way layout without
repeats (MS_seed is not taken below MS_rest). An interval is the mean +- t sqrt(V), with Satterthwaite's degrees of
freedom, at the level 0.05 / m for m comparisons (Bonferroni), so that all m hold together in 95 of 100 experiments,
however they depend on each other. p values are adjusted by Holm. Where a measure has no value for single questions,
the mean of each seed stands for all: the interval is then one of these questions alone.

Coverage at three and five seeds: `python -m benchmarks.coverage`.
Sources: Searle, Casella, McCulloch, "Variance Components", 4.3; Satterthwaite 1946; Holm 1979.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
MOST_SEEDS = 1000  # that `count_seeds_needed` tries


@dataclass(frozen=True)
class Estimate:
    """The mean of a difference, and what its variance consists of."""

    mean: float
    of_seeds: float  # variance of one seed's mean difference
    of_questions: float  # variance that more seeds would not reduce
    num_seeds: int
    num_questions: int

    def compute_error(self, num_seeds: int) -> tuple[float, float]:
        """Returns the standard error and its degrees of freedom for this many seeds, two or more."""
        terms = self.of_seeds / num_seeds, self.of_questions
        squares = terms[0] ** 2 / (num_seeds - 1) + terms[1] ** 2 / max(1, self.num_questions - 1)
        return math.sqrt(sum(terms)), sum(terms) ** 2 / squares if squares else num_seeds - 1

    def compute_half_width(self, num_seeds: int, level: float) -> float:
        """Returns half the width of the interval at confidence 1 - `level`."""
        error, freedom = self.compute_error(num_seeds)
        return error * float(stats.t.ppf(1 - level / 2, freedom))

    def compute_p(self) -> float:
        """Returns the two-sided p value of "no difference"; 1 for a single seed."""
        if self.num_seeds < 2:
            return 1.0
        error, freedom = self.compute_error(self.num_seeds)
        if error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / error, freedom))

    def count_seeds_needed(self, level: float) -> int | None:
        """Returns the fewest seeds with which a difference of this size would be shown; None if no number would do."""
        found = bisect(range(2, MOST_SEEDS + 1), -abs(self.mean), key=lambda n: -self.compute_half_width(n, level))
        return None if found == MOST_SEEDS - 1 else found + 2


def estimate_difference(differences: NDArray[np.float64]) -> Estimate:
    """Estimates the mean of `differences` (s seeds, q questions) and the parts of its variance."""
    num_seeds, num_questions = differences.shape
    mean = float(differences.mean())
    if num_seeds < 2:
        return Estimate(mean, math.nan, math.nan, num_seeds, num_questions)
    by_seed, by_question = differences.mean(1), differences.mean(0)
    of_seed = num_questions * float(by_seed.var(ddof=1))
    if num_questions < 2:
        return Estimate(mean, of_seed, 0.0, num_seeds, num_questions)
    rest = differences - by_seed[:, None] - by_question[None] + mean
    of_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_questions - 1))
    of_question = num_seeds * float(by_question.var(ddof=1))
    return Estimate(
        mean=mean,
        of_seeds=max(of_seed, of_rest) / num_questions,
        of_questions=max(0.0, of_question - of_rest) / (num_seeds * num_questions),
        num_seeds=num_seeds,
        num_questions=num_questions,
    )


@dataclass(frozen=True)
class Comparison:
    """A run less its control in one metric, in the metric's own unit."""

    run: str
    control: str
    metric: str
    difference: float
    low: float | None  # of the simultaneous 95 % interval; None for a single seed
    high: float | None
    adjusted_p: float | None  # by Holm; None for a single seed
    num_seeds: int
    num_questions: int  # 1: paired by seed alone
    shown: bool  # whether the interval excludes 0
    smallest: float | None  # difference that these seeds and questions could have shown
    seeds_needed: int | None  # to show a difference of this size; None if no number of seeds would do


def compare_runs(metric: str, differences: Mapping[tuple[str, str], NDArray[np.float64]]) -> list[Comparison]:
    """Compares runs in one metric; `differences` (s, q) by (run, control) are one family of comparisons."""
    estimates = {pair: estimate_difference(values) for pair, values in differences.items()}
    adjusted = adjust_by_holm([each.compute_p() for each in estimates.values()])
    level = LEVEL / max(1, len(estimates))
    return [
        _compare(pair, metric, estimate, p, level)
        for (pair, estimate), p in zip(estimates.items(), adjusted, strict=True)
    ]


def _compare(pair: tuple[str, str], metric: str, estimate: Estimate, p: float, level: float) -> Comparison:
    half = estimate.compute_half_width(estimate.num_seeds, level) if estimate.num_seeds > 1 else None
    return Comparison(
        run=pair[0],
        control=pair[1],
        metric=metric,
        difference=estimate.mean,
        low=None if half is None else estimate.mean - half,
        high=None if half is None else estimate.mean + half,
        adjusted_p=None if half is None else p,
        num_seeds=estimate.num_seeds,
        num_questions=estimate.num_questions,
        shown=half is not None and abs(estimate.mean) > half,
        smallest=half,
        seeds_needed=None if half is None else estimate.count_seeds_needed(level),
    )


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for the number of comparisons, in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
