"""The cost of a grid, by hand."""

import pytest

from stillhouse.reporting.cost import compute_cost, describe_cost, explain_missing_cost, format_seconds

DUMP = {"seconds": 20.0, "num_samples": 100}  # .2 s a sample
ENTRIES = [
    {"name": "sft", "seconds": 30.0, "num_samples_trained": 1000},
    {"name": "kd", "seconds": 40.0, "num_samples_trained": 1000},
    {"name": "kd", "seconds": 50.0, "num_samples_trained": 500},
]


def test_cost_by_hand() -> None:
    cost = compute_cost(ENTRIES, {"kd"}, DUMP, num_samples=2000)  # a dump that was resumed measured its last part
    assert cost["dump_s"] == pytest.approx(400)
    assert cost["cached_s"] == pytest.approx(120 + 400)
    assert cost["with_teacher_in_every_step_s"] == pytest.approx(120 + 0.2 * 1500)
    assert cost["runs_to_break_even"] == 3  # 400 s over 150 s a run
    assert describe_cost(cost) == (
        "Summed over runs, training took 2 min and the dump 7 min; with the teacher in every step, at the dump's rate, "
        "it would have been 7 min; the cache pays for itself after 3 distilled runs."
    )
    assert describe_cost({**cost, "runs_to_break_even": 1}).endswith("the cache paid for itself after 1 distilled run.")


@pytest.mark.parametrize("dump", [{}, {"seconds": 0.0, "num_samples": 4}, {"seconds": 4.0, "num_samples": 0}])
def test_no_cost_without_a_measured_dump(dump: dict[str, float]) -> None:
    assert compute_cost(ENTRIES, {"kd"}, dump, num_samples=4) == {}
    assert describe_cost({}) == ""
    assert explain_missing_cost(ENTRIES, {"kd"}, dump).endswith("since its dump left no measured seconds.")


def test_no_cost_without_distilled_runs_or_their_samples() -> None:
    assert compute_cost(ENTRIES, set(), DUMP, num_samples=4) == {}
    earlier = [{"name": "kd", "seconds": 1.0}]
    assert compute_cost(earlier, {"kd"}, DUMP, num_samples=4) == {}
    assert explain_missing_cost(ENTRIES, set(), DUMP).endswith("since no run is distilled.")
    assert "of an earlier version" in explain_missing_cost(earlier, {"kd"}, DUMP)


def test_no_cost_of_a_run_that_was_resumed_and_measured_its_end_alone() -> None:
    entries = [{**entry, "resumed_at": 0} for entry in ENTRIES]
    assert compute_cost(entries, {"kd"}, DUMP, num_samples=4)
    resumed = [*entries[:2], {**entries[2], "resumed_at": 7, "seed": 5}]
    assert compute_cost(resumed, {"kd"}, DUMP, num_samples=4) == {}
    assert "since kd-seed5 was resumed" in explain_missing_cost(resumed, {"kd"}, DUMP)


def test_durations_have_the_unit_that_fits() -> None:
    assert [format_seconds(each) for each in (3.14, 41, 99, 745, 12240)] == ["3.1 s", "41 s", "99 s", "12 min", "3.4 h"]
