"""Batches of samples for training, read and decoded by threads ahead of who consumes them.

A consumer that knows what it will ask for never waits for a decoder: Arrow, zstd and NumPy let go of Python's lock
while they work, so some threads keep up beside one that computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.reader.cache import Cache
from storage.reader.shuffle import WINDOW_ROWS
from storage.records.sample_batch import SampleBatch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
NUM_THREADS = 2
DEPTH = 4  # batches


class ReadsMany(Protocol[T_co]):
    """What read_ahead needs of a cache, or of several that are read as one."""

    def read_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> T_co: ...


def read_ahead(
    cache: ReadsMany[T],
    batches: Iterable[Sequence[int] | NDArray[np.int64]],
    *,
    draw_sets: Iterable[int] | None = None,
    num_threads: int = NUM_THREADS,
    depth: int = DEPTH,
) -> Generator[T, None, None]:
    """`cache.read_many` of each of these, in their order, with up to `depth` read before they are asked for.

    `draw_sets`, one a batch, as `read_many` takes them: the epoch, say. None: set 0 throughout.
    An error is raised where the batch that it happened to is asked for. Threads end with the iterator.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(num_threads, "read-ahead")
    try:
        for indices, draw_set in zip(batches, itertools.repeat(0) if draw_sets is None else draw_sets, strict=False):
            waiting.append(pool.submit(cache.read_many, indices, draw_set=draw_set))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def shuffled_batches(
    cache: Cache,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    batch_size: int,
    steps: range,
    seed: int = 0,
    window_rows: int = WINDOW_ROWS,
    rank: int = 0,
    num_ranks: int = 1,
    num_threads: int = NUM_THREADS,
    depth: int = DEPTH,
) -> Generator[SampleBatch, None, None]:
    """Batches of some samples (None: of all) in shuffled order, epoch after epoch.

    `steps` are the numbers of the batches wanted: `range(s, n)` goes on exactly where `range(s)` ended. A batch is of
    `batch_size` samples over all ranks, of which this one gets every `num_ranks`-th: the same samples in the same
    batches, however many ranks there are. Order: see storage/reader/shuffle.py. Where a cache
    has several sets of draws, each epoch reads the next. ValueError for fewer samples than ranks.
    """
    if not 0 <= rank < num_ranks <= batch_size:
        raise ValueError(f"rank {rank} of {num_ranks} for batches of {batch_size} samples: each rank must get one")
    chosen = np.arange(cache.num_samples) if indices is None else np.asarray(indices, np.int64)
    order = cache.shuffle(chosen, window_rows=window_rows)
    mine = (chosen[order.batch(step, batch_size, seed=seed)][rank::num_ranks] for step in steps)
    epochs = (step * batch_size // len(order) for step in steps)
    return read_ahead(cache, mine, draw_sets=epochs, num_threads=num_threads, depth=depth)
