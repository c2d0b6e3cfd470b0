"""The report's comparisons: by hand, against scipy, and how often their intervals hold in simulated grids."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import WORLDS, World, measure
from stillhouse.reporting.comparisons import adjust_by_holm, compare_runs, estimate_difference

RANDOM = np.random.Generator(np.random.PCG64(3))


def test_without_questions_it_is_the_paired_t_test() -> None:
    one, other = RANDOM.random((2, 5))
    (found,) = compare_runs("kl_to_teacher", {("kd", "sft"): (one - other)[:, None]})
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert found.adjusted_p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.shown == (expected.pvalue < 0.05)


def test_variance_by_hand() -> None:
    # Seed means 1, 2; question means 1, 2; no rest: MS_seed = 2 * .5 = 1, MS_question = 1, MS_rest = 0.
    found = estimate_difference(np.array([[0.5, 1.5], [1.5, 2.5]]))
    assert (found.mean, found.of_seeds, found.of_questions) == pytest.approx((1.5, 0.5, 0.25))
    error, freedom = found.compute_error(2)
    assert error == pytest.approx(0.5**0.5)
    assert freedom == pytest.approx(2.0)  # (1/4 + 1/4)^2 / (1/16 + 1/16)


def test_questions_that_differ_widen_the_interval() -> None:
    """Seeds that agree on each question say little about other questions."""
    answers = np.repeat(RANDOM.integers(-1, 2, (1, 40)), 4, axis=0).astype(float)
    by_question = estimate_difference(answers)
    assert by_question.compute_half_width(4, 0.05) == pytest.approx(
        stats.t.ppf(0.975, 39) * answers[0].std(ddof=1) / 40**0.5, rel=1e-6
    )
    assert estimate_difference(answers.mean(1, keepdims=True)).compute_half_width(4, 0.05) == 0


def test_several_comparisons_are_simultaneous_and_adjusted_by_holm() -> None:
    values = {("kd", str(control)): RANDOM.normal(control, 1, (5, 1)) for control in range(4)}
    family = compare_runs("exact_match", values)
    for (pair, differences), found in zip(values.items(), family, strict=True):
        (alone,) = compare_runs("exact_match", {pair: differences})
        assert found.smallest == pytest.approx(
            alone.smallest * stats.t.ppf(1 - 0.05 / 8, 4) / stats.t.ppf(0.975, 4)  # Bonferroni: .05 / 4 each
        )
        assert found.adjusted_p is not None
        assert alone.adjusted_p is not None
        assert found.adjusted_p >= alone.adjusted_p
    assert adjust_by_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_by_holm([0.5, 0.9]) == [1.0, 1.0]
    assert adjust_by_holm([]) == []


def test_needed_seeds_are_those_that_would_have_shown_the_difference() -> None:
    estimate = estimate_difference(RANDOM.normal(0.5, 1, (3, 200)) + RANDOM.normal(0, 0.4, (3, 1)))
    needed = estimate.count_seeds_needed(0.05)
    assert needed is not None
    assert (
        estimate.compute_half_width(needed, 0.05) < abs(estimate.mean) <= estimate.compute_half_width(needed - 1, 0.05)
    )
    no_difference = estimate_difference(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert no_difference.count_seeds_needed(0.05) is None


def test_one_seed_shows_nothing() -> None:
    (found,) = compare_runs("exact_match", {("kd", "sft"): np.ones((1, 9))})
    assert (found.low, found.high, found.shown, found.adjusted_p, found.seeds_needed) == (None, None, False, None, None)
    (same,) = compare_runs("exact_match", {("kd", "sft"): np.zeros((3, 9))})
    assert (same.low, same.high, same.shown, same.adjusted_p) == (0.0, 0.0, False, 1.0)


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_simultaneous_intervals_hold_in_simulated_grids(world: World, num_seeds: int) -> None:
    """At least 95 of 100 grids; less three standard errors of 150 simulated ones."""
    assert measure(world, num_seeds, 150)["all_hold"] > 0.95 - 3 * (0.95 * 0.05 / 150) ** 0.5
