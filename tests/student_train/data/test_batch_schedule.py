from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StillhouseError
from storage.reader.shuffle import Shuffle
from student_train.data.batch_schedule import (
    Prefetcher,
    SampleTable,
    count_micro_batches,
    group_micro_batches_by_length,
    plan_micro_batches,
    split_micro_batches,
)
from student_train.losses.row_counts import RowCounts


def table(size: int) -> SampleTable:
    numbers = np.arange(size)
    return SampleTable(
        indices=numbers + 100, num_response_rows=numbers + 1, num_images=numbers % 3, num_visual_rows=numbers % 3 * 4
    )


@given(size=st.integers(1, 60), micro=st.integers(1, 20), num_ranks=st.integers(1, 9))
def test_ranks_share_a_batch_in_equally_many_pieces(size: int, micro: int, num_ranks: int) -> None:
    batch = np.random.default_rng(size).permutation(size)
    pieces = [split_micro_batches(batch, micro, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    expected = count_micro_batches(size, micro, num_ranks=num_ranks)
    assert {len(of_rank) for of_rank in pieces} == {expected}
    assert np.concatenate([piece for of_rank in pieces for piece in of_rank]).tolist() == batch.tolist()
    assert max(len(piece) for of_rank in pieces for piece in of_rank) <= micro


@given(size=st.integers(1, 60), micro=st.integers(1, 20), num_ranks=st.integers(1, 9))
def test_grouping_by_length_keeps_sizes_and_sorts(size: int, micro: int, num_ranks: int) -> None:
    random = np.random.default_rng(size)
    batch, lengths = random.permutation(size), random.integers(1, 9, size)
    pieces = group_micro_batches_by_length(batch, lengths, micro, num_ranks=num_ranks)
    assert {len(of_rank) for of_rank in pieces} == {count_micro_batches(size, micro, num_ranks=num_ranks)}
    in_turn = [piece for together in zip(*pieces, strict=True) for piece in together]
    assert max(map(len, in_turn)) <= micro
    assert max(map(len, in_turn)) - min(map(len, in_turn)) <= 1
    found = np.concatenate(in_turn)
    assert sorted(found.tolist()) == list(range(size))
    assert (np.diff(lengths[found]) <= 0).all()


@given(
    size=st.integers(1, 20), batch=st.integers(1, 24), micro=st.integers(1, 8), num_ranks=st.integers(1, 4),
    groups=st.booleans(),
)  # fmt: skip
def test_totals_are_those_of_the_global_batch_on_every_rank(
    size: int, batch: int, micro: int, num_ranks: int, groups: bool
) -> None:
    samples = replace(table(size), lengths=np.arange(size) * 7 % 5 if groups else None)
    by_rank = [
        list(plan_micro_batches(samples, batch, micro, steps=range(2), seed=3, rank=rank, num_ranks=num_ranks))
        for rank in range(num_ranks)
    ]
    for step in range(2):
        rows = Shuffle.plain(size).batch(step, batch, seed=3)
        expected = RowCounts(
            response=int((rows + 1).sum()), visual=4 * int((rows % 3).sum()), relation=int((rows % 3).sum()),
            samples=batch,
        )  # fmt: skip
        mine = [plan for of_rank in by_rank for plan in of_rank if plan.step == step]
        expected = replace(expected, micro_batches=sum(plan.counted for plan in mine))
        assert {plan.totals for plan in mine} == {expected}
        counted = np.concatenate([plan.rows for plan in mine if plan.counted])
        assert sorted(counted.tolist()) == sorted(rows.tolist())
        for together in zip(*([plan for plan in each if plan.step == step] for each in by_rank), strict=True):
            assert len({(plan.micro, plan.largest) for plan in together}) == 1
            counts = [samples.count_rows(plan.rows).response for plan in together if plan.counted]
            assert together[0].largest.response == max(counts)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_resumed_schedule_gives_the_same_plans_on_any_number_of_ranks(num_ranks: int) -> None:
    order = Shuffle(np.arange(40) // 4, np.full(10, 100), window_rows=300)
    samples = replace(table(40), order=order)

    def rows(steps: range, rank: int, ranks: int = num_ranks) -> list[int]:
        micro_plans = plan_micro_batches(samples, 8, 3, steps=steps, seed=5, rank=rank, num_ranks=ranks)
        return np.concatenate([plan.rows for plan in micro_plans]).tolist()

    for rank in range(num_ranks):
        assert rows(range(7), rank) + rows(range(7, 12), rank) == rows(range(12), rank)
    for step in range(12):
        of_ranks = [rows(range(step, step + 1), rank) for rank in range(num_ranks)]
        assert [row for of_rank in of_ranks for row in of_rank] == rows(range(step, step + 1), 0, ranks=1)


def test_a_rank_without_samples_gets_a_filler() -> None:
    third = list(plan_micro_batches(table(5), 2, 1, steps=range(1), seed=0, rank=0, num_ranks=3))
    assert [(len(plan.rows), plan.counted) for plan in third] == [(1, False)]


def test_the_prefetcher_yields_in_order() -> None:
    with Prefetcher(iter(range(20)), depth=2) as reader:
        assert list(reader) == list(range(20))


def test_the_prefetcher_raises_the_thread_s_error_at_its_item() -> None:
    def items():
        yield 1
        raise StillhouseError("sample 'x': broken")

    with Prefetcher(items()) as reader:
        iterator = iter(reader)
        assert next(iterator) == 1
        with pytest.raises(StillhouseError, match="sample 'x': broken"):
            next(iterator)


def test_the_prefetcher_stays_within_its_depth_and_stops_with_its_reader() -> None:
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    with Prefetcher(items(), depth=3) as reader:
        assert next(iter(reader)) == 0
        time.sleep(0.2)
    assert len(made) <= 6
