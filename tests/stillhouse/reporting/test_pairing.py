"""Differences by question of measures that are means over rows, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillhouse.reporting.comparisons import estimate_difference
from stillhouse.reporting.pairing import pair_runs, subtract_controls, weigh_by_rows

ROWS = {"a": 1, "b": 3, "c": 8}


def entry(seed: int, sums: dict[str, float], **fields: Any) -> dict[str, Any]:
    samples = [{"sample_id": name, "num_rows": ROWS[name], "kl_sum": total} for name, total in sums.items()]
    kl = sum(sums.values()) / sum(ROWS[name] for name in sums)
    return {"seed": seed, "kl_to_teacher": kl, "fidelity_by_sample": samples, **fields}


def test_the_mean_of_each_seed_is_the_difference_over_rows() -> None:
    runs = [entry(0, {"a": 1.0, "b": 2.0, "c": 0.5}), entry(1, {"a": 0.1, "b": 0.2, "c": 4.0})]
    controls = [entry(0, {"a": 2.0, "b": 2.5, "c": 3.0}), entry(1, {"c": 5.0, "b": 1.0, "a": 0.3})]
    found = subtract_controls(list(zip(runs, controls, strict=True)), "kl_to_teacher")
    assert found.shape == (2, 3)
    expected = [run["kl_to_teacher"] - control["kl_to_teacher"] for run, control in zip(runs, controls, strict=True)]
    assert found.mean(1) == pytest.approx(expected, rel=1e-12)


def test_rows_that_all_differ_equally_do_not_vary_with_the_lengths_of_questions() -> None:
    num_rows = np.array([1.0, 3.0, 8.0])
    assert weigh_by_rows(-0.25 * num_rows[None], num_rows) == pytest.approx(np.full((1, 3), -0.25))


def test_its_standard_error_is_that_of_redrawn_questions() -> None:
    """Against a bootstrap of questions whose rows differ the more, the longer they are."""
    draw = np.random.default_rng(0)
    num_rows = draw.integers(1, 20, 200).astype(float)
    sums = num_rows * (0.1 + 0.02 * num_rows + draw.normal(0, 0.05, 200))
    values = weigh_by_rows(np.stack([sums, sums]), num_rows)
    drawn = draw.integers(0, 200, (4000, 200))
    spread = (sums[drawn].sum(1) / num_rows[drawn].sum(1)).std()
    estimate = estimate_difference(values)
    assert estimate.mean == pytest.approx(sums.sum() / num_rows.sum())
    assert estimate.of_questions**0.5 == pytest.approx(spread, rel=0.1)


def test_a_question_pairs_only_where_both_have_the_same_rows() -> None:
    run, control = entry(0, {"a": 1.0, "b": 2.0}), entry(0, {"a": 2.0, "b": 2.5})
    assert subtract_controls([(run, control)], "kl_to_teacher").shape == (1, 2)
    other = entry(0, {"a": 2.0, "c": 2.5})
    earlier = {"seed": 0, "kl_to_teacher": 0.7}
    for partner in (other, earlier):  # judged on other samples; of a version that kept no sums
        found = subtract_controls([(run, partner)], "kl_to_teacher")
        assert found.tolist() == [[run["kl_to_teacher"] - partner["kl_to_teacher"]]]


def test_seeds_pair_by_number_and_runs_without_a_measure_do_not() -> None:
    by_name = {
        "kd": [entry(3, {"a": 1.0}), entry(5, {"a": 2.0})],
        "sft": [entry(5, {"a": 4.0}), entry(4, {"a": 9.0})],
        "none": [{"seed": 5, "kl_to_teacher": None}],
    }
    found = pair_runs(by_name, {"kd": ["sft", "none"]}, "kl_to_teacher")
    assert {pair: values.tolist() for pair, values in found.items()} == {("kd", "sft"): [[-2.0]]}
