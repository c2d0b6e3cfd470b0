import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.layout.documents import Commit
from storage.layout.error_summaries import summary, total


def commit_of(part, **errors):
    return Commit(
        format_version=1, cache_sha256="0" * 64, part=part, num_samples=0, num_images=0, num_rows={}, families={},
        errors=(), errors_by_family={family: summary(family, each) for family, each in errors.items()},
    )  # fmt: skip


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200), min_size=1, max_size=5))
def test_the_total_is_that_of_all_errors_but_for_a_p99_that_may_be_larger(parts):
    every = [error for errors in parts for error in errors]
    merged = total([commit_of(part, hidden=errors) for part, errors in enumerate(parts)])
    assert merged is not None
    got, exact = merged["hidden"], summary("hidden", every)
    assert (got.measure, got.count, got.max) == ("relative_error", len(every), max(every))
    assert got.mean == pytest.approx(np.mean(every), rel=1e-9, abs=1e-12)
    assert got.p99 >= exact.p99
    assert summary("hidden", every[::-1]) == exact


def test_families_that_only_some_parts_have_are_summed_over_those():
    merged = total([commit_of(0), commit_of(1, relation=[0.25]), commit_of(2, relation=[0.75], hidden=[0.0])])
    assert merged is not None
    assert {family: (each.count, each.mean, each.max) for family, each in merged.items()} == {
        "hidden": (1, 0.0, 0.0),
        "relation": (2, 0.5, 0.75),
    }


def test_older_commits_that_state_no_errors_give_no_total():
    older = commit_of(0).model_copy(update={"errors_by_family": None})
    assert total([older, commit_of(1, relation=[0.5])]) is None
    assert b"errors_by_family" not in older.to_bytes()


def test_errors_that_are_no_numbers_are_refused():
    for error in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValidationError):
            summary("hidden", [error])
