import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.layout.documents import Commit
from storage.layout.error_summaries import merge_summaries, summarize_encoding_errors


def make_commit(part, **errors):
    summaries = {family: summarize_encoding_errors(family, values) for family, values in errors.items()}
    return Commit(
        format_version=1, cache_sha256="0" * 64, part=part, num_samples=0, num_images=0, num_rows={}, families={},
        errors=(), errors_by_family=summaries,
    )  # fmt: skip


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200), min_size=1, max_size=5))
def test_the_total_is_that_of_all_errors_but_for_a_p99_that_may_be_larger(parts):
    every = [error for errors in parts for error in errors]
    merged = merge_summaries([make_commit(part, hidden=errors) for part, errors in enumerate(parts)])
    assert merged is not None
    got, exact = merged["hidden"], summarize_encoding_errors("hidden", every)
    assert (got.measure, got.count, got.max) == ("relative_error", len(every), max(every))
    assert got.mean == pytest.approx(np.mean(every), rel=1e-9, abs=1e-12)
    assert got.p99 >= exact.p99
    assert summarize_encoding_errors("hidden", every[::-1]) == exact


def test_families_that_only_some_parts_have_are_summed_over_those():
    merged = merge_summaries(
        [make_commit(0), make_commit(1, relation=[0.25]), make_commit(2, relation=[0.75], hidden=[0.0])]
    )
    assert merged is not None
    assert {family: (each.count, each.mean, each.max) for family, each in merged.items()} == {
        "hidden": (1, 0.0, 0.0),
        "relation": (2, 0.5, 0.75),
    }


def test_older_commits_that_state_no_errors_give_no_total():
    older = make_commit(0).model_copy(update={"errors_by_family": None})
    assert merge_summaries([older, make_commit(1, relation=[0.5])]) is None
    assert b"errors_by_family" not in older.to_bytes()


def test_errors_that_are_no_numbers_are_refused():
    for error in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValidationError):
            summarize_encoding_errors("hidden", [error])
