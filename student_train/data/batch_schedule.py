"""The schedule of batches: sample order, the samples of each rank, row counts of global batches, and prefetch.

Order depends only on (seed, epoch, position); see storage/reader/shuffle.py. A global batch is the next
`global_batch` samples of the endless sequence of shuffled epochs; each rank takes a share of it and splits that into
micro-batches, the same number on every rank. Samples of similar length share a micro-batch, to save padding; that
does not change the global batch, nor the loss, which is a mean over all of its rows. Row counts come from the
cache's plain columns, so each rank knows those of the whole global batch without communication.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.reader.shuffle import Shuffle
from student_train.losses.row_counts import RowCounts

T = TypeVar("T")
_END = object()


class SampleOrder(Protocol):
    """An endless sequence of epochs, such as storage.reader.shuffle.Shuffle or mixture.InterleavedOrder."""

    def __len__(self) -> int:
        """Return the number of samples, or pairs, of an epoch."""
        ...

    def batch(self, step: int, size: int, *, seed: int) -> NDArray[np.int64]:
        """Return positions `step * size` to `(step + 1) * size` of the sequence."""
        ...


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples that a stage trains on, with their numbers of rows."""

    indices: NDArray[np.int64]  # (s,) into the cache; of pairs (s, 2): chosen, rejected
    num_response_rows: NDArray[np.int64]  # (s,)
    num_images: NDArray[np.int64]  # (s,)
    num_visual_rows: NDArray[np.int64]  # (s,) of the teacher
    lengths: NDArray[np.int64] | None = None  # (s,) positions in the student; None: no grouping by length
    order: SampleOrder | None = None  # of the samples, or pairs; None: all in one window

    def count_rows(self, rows: NDArray[np.int64]) -> RowCounts:
        """Sum the row counts of some rows of this table; repeated rows count repeatedly."""
        return RowCounts(
            response=int(self.num_response_rows[rows].sum()),
            visual=int(self.num_visual_rows[rows].sum()),
            relation=int(self.num_images[rows].sum()),
            samples=len(rows),
        )

    def __len__(self) -> int:
        """Return the number of samples, or pairs, of an epoch."""
        return len(self.indices) if self.order is None else len(self.order)


@dataclass(frozen=True, eq=False)
class MicroBatchPlan:
    """The samples of one rank's forward pass, and the row counts that its loss is divided by."""

    step: int
    micro: int  # 0 .. num_micro - 1
    num_micro: int
    rows: NDArray[np.int64]  # of the sample table, one or more
    counted: bool  # False: the rank has no samples left, and computes a filler without loss
    totals: RowCounts  # of the global batch
    largest: RowCounts  # maximum over ranks of the counts in this micro-batch


def count_micro_batches(global_size: int, micro_size: int, *, num_ranks: int) -> int:
    """Return the number of forward passes of each rank for a global batch: enough for the largest slice."""
    return math.ceil(math.ceil(global_size / num_ranks) / micro_size)


def split_micro_batches(
    batch: NDArray[np.int64], micro_size: int, *, rank: int, num_ranks: int
) -> list[NDArray[np.int64]]:
    """Split one rank's contiguous slice of a global batch into nearly equal micro-batches.

    Their number is the same on every rank; some may be empty.
    """
    edges = [len(batch) * each // num_ranks for each in (rank, rank + 1)]
    pieces = count_micro_batches(len(batch), micro_size, num_ranks=num_ranks)
    return np.array_split(batch[edges[0] : edges[1]], pieces)


def group_micro_batches_by_length(
    batch: NDArray[np.int64], lengths: NDArray[np.int64], micro_size: int, *, num_ranks: int
) -> list[list[NDArray[np.int64]]]:
    """Group a global batch into each rank's micro-batches of similar lengths, longest first.

    Number and sizes are those of `split_micro_batches`. Micro-batches that ranks compute at the same time have
    similar lengths as well.
    """
    pieces = count_micro_batches(len(batch), micro_size, num_ranks=num_ranks)
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    cut = np.array_split(longest_first, pieces * num_ranks)
    return [cut[rank::num_ranks] for rank in range(num_ranks)]


def plan_micro_batches(
    table: SampleTable, size: int, micro_size: int, *, steps: range, seed: int, rank: int, num_ranks: int
) -> Iterator[MicroBatchPlan]:
    """Yield one rank's forward passes of the given steps; `range(s, n)` resumes where `range(s)` ended."""
    order = table.order or Shuffle.plain(len(table))
    for step in steps:
        batch = order.batch(step, size, seed=seed)
        pieces = (
            [split_micro_batches(batch, micro_size, rank=each, num_ranks=num_ranks) for each in range(num_ranks)]
            if table.lengths is None
            else group_micro_batches_by_length(batch, table.lengths, micro_size, num_ranks=num_ranks)
        )
        num_filled = sum(len(rows) > 0 for of_rank in pieces for rows in of_rank)
        totals = replace(table.count_rows(batch), micro_batches=num_filled)
        for micro, rows in enumerate(pieces[rank]):
            each = [table.count_rows(of_rank[micro]) for of_rank in pieces]
            yield MicroBatchPlan(
                step=step,
                micro=micro,
                num_micro=len(pieces[rank]),
                rows=rows if len(rows) else batch[:1],
                counted=len(rows) > 0,
                totals=totals,
                largest=RowCounts(*(max(getattr(c, f) for c in each) for f in RowCounts.__dataclass_fields__)),
            )


class Prefetcher(Generic[T]):
    """Computes the next items in a background thread. Use as a context manager.

    An error in the thread is raised when its item is requested.
    """

    def __init__(self, items: Iterable[T], *, depth: int = 2) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._next()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    def _next(self) -> tuple:
        while True:
            try:
                return self._queue.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the prefetch thread died without an error") from None

    def _work(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((_END, None))
        except BaseException as error:  # the consumer raises it
            self._put((None, error))

    def _put(self, message: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
