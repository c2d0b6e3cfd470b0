"""Sample order, who gets which sample, how many rows a global batch has, and reading ahead.

Order depends only on (seed, epoch, position): storage/reader/shuffle.py makes it. A global batch is the next
`global_batch` samples of the endless sequence of shuffled epochs; each rank takes a share of it and cuts that into
micro-batches, as many on every rank. Samples of like length share a micro-batch, so there is little padding; a
global batch stays what it is, and with it the loss, since that is a mean over all of its rows. Row counts come
from the cache's plain columns, so every rank knows those of the whole global batch without asking the others.
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


class Order(Protocol):
    """An endless sequence of epochs, as storage.reader.shuffle.Shuffle and mixture.Interleaving make it."""

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, *, seed: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples that a stage trains on, with the counts that their losses are divided by."""

    indices: NDArray[np.int64]  # (s,) into the cache; of pairs (s, 2): chosen, rejected
    num_response_rows: NDArray[np.int64]  # (s,)
    num_images: NDArray[np.int64]  # (s,)
    num_visual_rows: NDArray[np.int64]  # (s,) of the teacher
    lengths: NDArray[np.int64] | None = None  # (s,) positions of the student, by which micro-batches are grouped
    order: Order | None = None  # of the samples, or pairs; None: all in one window

    def counts(self, rows: NDArray[np.int64]) -> RowCounts:
        """Row counts of some rows of this table, repetitions counted."""
        return RowCounts(
            response=int(self.num_response_rows[rows].sum()),
            visual=int(self.num_visual_rows[rows].sum()),
            relation=int(self.num_images[rows].sum()),
            samples=len(rows),
        )

    def __len__(self) -> int:
        """Samples, or pairs, of an epoch."""
        return len(self.indices) if self.order is None else len(self.order)


@dataclass(frozen=True, eq=False)
class MicroPlan:
    """What one rank computes in one forward pass."""

    step: int
    micro: int  # 0 .. num_micro - 1
    num_micro: int
    rows: NDArray[np.int64]  # of the sample table, one or more
    counted: bool  # False: this rank has run out of samples, and a sample stands in without any loss
    totals: RowCounts  # of the global batch
    largest: RowCounts  # the most that any rank has in its micro-batch of this number


def num_micro_batches(global_size: int, micro_size: int, *, num_ranks: int) -> int:
    """Forward passes that every rank makes for a global batch: enough for the largest slice."""
    return math.ceil(math.ceil(global_size / num_ranks) / micro_size)


def micro_batches(batch: NDArray[np.int64], micro_size: int, *, rank: int, num_ranks: int) -> list[NDArray[np.int64]]:
    """One rank's contiguous slice of a global batch in nearly equal pieces, as many on every rank.

    Some may be empty.
    """
    edges = [len(batch) * each // num_ranks for each in (rank, rank + 1)]
    pieces = num_micro_batches(len(batch), micro_size, num_ranks=num_ranks)
    return np.array_split(batch[edges[0] : edges[1]], pieces)


def grouped_by_length(
    batch: NDArray[np.int64], lengths: NDArray[np.int64], micro_size: int, *, num_ranks: int
) -> list[list[NDArray[np.int64]]]:
    """Each rank's micro-batches of a global batch, samples of like `lengths` together, the longest first.

    As many and as large as those of `micro_batches`. Ranks that wait for each other have like lengths too.
    """
    pieces = num_micro_batches(len(batch), micro_size, num_ranks=num_ranks)
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    cut = np.array_split(longest_first, pieces * num_ranks)
    return [cut[rank::num_ranks] for rank in range(num_ranks)]


def plans(
    table: SampleTable, size: int, micro_size: int, *, steps: range, seed: int, rank: int, num_ranks: int
) -> Iterator[MicroPlan]:
    """One rank's forward passes of the steps in turn: `range(s, n)` goes on where `range(s)` ended."""
    order = table.order or Shuffle.plain(len(table))
    for step in steps:
        batch = order.batch(step, size, seed=seed)
        pieces = (
            [micro_batches(batch, micro_size, rank=each, num_ranks=num_ranks) for each in range(num_ranks)]
            if table.lengths is None
            else grouped_by_length(batch, table.lengths, micro_size, num_ranks=num_ranks)
        )
        num_filled = sum(len(rows) > 0 for of_rank in pieces for rows in of_rank)
        totals = replace(table.counts(batch), micro_batches=num_filled)
        for micro, rows in enumerate(pieces[rank]):
            each = [table.counts(of_rank[micro]) for of_rank in pieces]
            yield MicroPlan(
                step=step,
                micro=micro,
                num_micro=len(pieces[rank]),
                rows=rows if len(rows) else batch[:1],
                counted=len(rows) > 0,
                totals=totals,
                largest=RowCounts(*(max(getattr(c, f) for c in each) for f in RowCounts.__dataclass_fields__)),
            )


class ReadAhead(Generic[T]):
    """Computes items in a background thread, a few ahead of who iterates. Use as a context manager.

    An error of the thread is raised where the item it failed at is asked for.
    """

    def __init__(self, items: Iterable[T], *, depth: int = 2) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
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
                    raise RuntimeError("the read-ahead thread has died without an error") from None

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
