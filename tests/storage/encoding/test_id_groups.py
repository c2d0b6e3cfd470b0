"""Groups of ids of like frequency."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encoding.id_groups import MAX_GROUPS, IdGroups
from storage.errors import CorruptPartError


def test_frequent_ids_come_first_and_alone():
    groups = IdGroups.of_counts(np.array([0, 1, 1000, 1, 500, 1, 1]))
    assert groups.ids[:2].tolist() == [2, 4]
    assert groups.sizes[:2].tolist() == [1, 1]
    assert groups.widths[:2].tolist() == [0, 0]
    assert groups.ranks[0] == -1  # never stored, so in no group
    assert sorted(groups.ids.tolist()) == [1, 2, 3, 4, 5, 6]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3000))
def test_every_stored_id_has_one_rank_and_fits_its_group(counts):
    groups = IdGroups.of_counts(np.array(counts))
    stored = np.flatnonzero(counts)
    assert len(groups.sizes) <= MAX_GROUPS
    assert sorted(groups.ids.tolist()) == stored.tolist()
    assert (groups.ids[groups.ranks[stored]] == stored).all()
    group = np.searchsorted(groups.starts, groups.ranks[stored], side="right") - 1
    places = groups.ranks[stored] - groups.starts[group]
    assert (places < groups.sizes[group]).all()
    assert (places < 1 << groups.widths[group]).all()
    assert IdGroups.parse(groups.table.tobytes(), len(counts)).ids.tolist() == groups.ids.tolist()


def test_a_large_vocabulary_with_one_group_left_takes_all_that_is_left():
    counts = np.full(200_000, 1)
    counts[:240] = 10**9  # each in a group of its own
    groups = IdGroups.of_counts(counts)
    assert len(groups.sizes) <= MAX_GROUPS
    assert groups.sizes.sum() == len(counts)


@pytest.mark.parametrize(("table", "problem"), [(b"\0" * 9, "has 9 ids"), (b"\xff" * 10, "has a group 255")])
def test_a_damaged_table_is_refused(table, problem):
    with pytest.raises(CorruptPartError, match=problem):
        IdGroups.parse(table, 10)
