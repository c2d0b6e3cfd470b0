import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.records.sparse_rows import SparseRows
from tests.storage.synthetic_cache import TAU, VOCAB_SIZE, make_logits, select


def make_rows(num_rows=5, seed=0, labels=True):
    rng = np.random.default_rng(seed)
    return select(make_logits(rng, num_rows), tau=TAU, rng=rng, labels=labels)


@given(st.lists(st.integers(0, 4), max_size=5), st.booleans())
def test_concatenated_slices_are_the_whole(sizes, labels):
    rows = make_rows(sum(sizes), labels=labels)
    bounds = np.cumsum([0, *sizes])
    pieces = [rows.slice(int(a), int(b)) for a, b in pairwise(bounds)]
    for piece in pieces:
        piece.validate(VOCAB_SIZE)
    if pieces:
        assert SparseRows.concatenate(pieces).equals(rows)


def test_nothing_concatenated_is_empty():
    empty = SparseRows.concatenate([])
    empty.validate(1)
    assert empty.num_rows == empty.num_entries == 0


def test_concatenation_refuses_to_mix_rows_with_and_without_labels():
    with pytest.raises(ValueError, match="all or none"):
        SparseRows.concatenate([make_rows(labels=True), make_rows(labels=False)])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 6)])
def test_slice_out_of_bounds_is_refused(start, stop):
    with pytest.raises(IndexError):
        make_rows(5).slice(start, stop)


def test_row_of_entry_and_is_exact_agree_with_a_loop():
    rows = make_rows(7)
    row_of_entry, is_exact = [], []
    for row in range(rows.num_rows):
        for position in range(rows.offsets[row + 1] - rows.offsets[row]):
            row_of_entry.append(row)
            is_exact.append(position < rows.num_exact[row])
    assert rows.row_of_entry().tolist() == row_of_entry
    assert rows.is_exact().tolist() == is_exact


def spoil(name, position, value):
    def change(rows):
        array = getattr(rows, name).copy()
        array[position] = value
        return dataclasses.replace(rows, **{name: array})

    return change


PEAKED = np.log(np.array([[0.6, 0.2, 0.1, 0.05, 0.05], [0.4, 0.3, 0.1, 0.1, 0.1]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("ids", 0, -1), "row 0: an id is outside"),
        (spoil("ids", -1, 5), "row 1: an id is outside"),
        (spoil("logprobs", 0, np.nan), "row 0: a logprob is not finite"),
        (spoil("logprobs", 0, 0.1), "row 0: an exact logprob is above 0"),
        (spoil("logprobs", 1, -0.1), "row 0: exact logprobs are not in descending order"),
        (spoil("logprobs", 0, -0.4), "row 0: exact entries and tail mass do not sum to 1"),
        (spoil("tail_mass", 1, 1.5), "row 1: the tail mass is outside"),
        (spoil("tail_mass", 1, np.nan), "row 1: the tail mass is outside"),
        (spoil("tail_mass", 0, 0.9), "row 0: exact entries and tail mass"),
        (spoil("entropy", 0, -1), "row 0: the entropy"),
        (spoil("entropy", 0, np.inf), "row 0: the entropy"),
        (
            lambda rows: dataclasses.replace(rows, log_sum_exp=np.array([[1, 2], [3, np.inf]], np.float32)),
            "row 1: a log-sum-exp",
        ),
        (spoil("label_logprob", 1, 0.5), "row 1: the label logprob"),
        (spoil("label_logprob", 1, -np.inf), "row 1: the label logprob"),
        (spoil("offsets", 1, 99), "offsets must not decrease"),
        (spoil("offsets", 0, 1), "offsets must start with 0"),
        (spoil("offsets", -1, 99), "offsets end at 99"),
        (spoil("num_exact", 0, -1), "row 0: num_exact is wrong"),
        (spoil("num_exact", 1, 99), "row 1: num_exact is wrong"),
        (lambda rows: dataclasses.replace(rows, ids=rows.ids.astype(np.int64)), "ids must be a 1-d array"),
        (lambda rows: dataclasses.replace(rows, entropy=rows.entropy[:1]), "entropy has 1 values for 2"),
    ],
)
def test_invalid_rows_are_refused_by_name(change, message):
    rows = select(PEAKED, tau=0.15, rng=np.random.default_rng(0), labels=True)
    rows.validate(5)
    with pytest.raises(ValueError, match=message):
        change(rows).validate(5)


def test_an_id_may_not_appear_twice_in_a_row_but_in_two_rows():
    rows = select(PEAKED, tau=0.15, rng=np.random.default_rng(0), labels=False)
    assert rows.ids[0] == rows.ids[rows.offsets[1]]
    with pytest.raises(ValueError, match="row 0: an id appears twice"):
        spoil("ids", 1, rows.ids[0])(rows).validate(5)


def test_sampled_ids_must_ascend():
    rows = select(make_logits(np.random.default_rng(3), 1) * 0.1, tau=TAU, rng=np.random.default_rng(0), labels=False)
    assert rows.num_exact[0] == 0
    assert rows.num_entries > 2
    swapped = rows.ids[[1, 0, *range(2, rows.num_entries)]]
    with pytest.raises(ValueError, match="row 0: sampled ids are not ascending"):
        dataclasses.replace(rows, ids=swapped).validate(VOCAB_SIZE)
