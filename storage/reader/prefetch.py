"""Prefetches batches of samples for training: threads read and decode them before they are requested.

Arrow, zstd and NumPy release Python's lock while they work, so a few threads keep up with a training
loop whose order of samples is known in advance.
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
DEPTH = 4  # batches that are read in advance


class BatchSource(Protocol[T_co]):
    """Anything with Cache.read_many: one cache, or several that are read as one."""

    def read_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> T_co: ...


def prefetch_batches(
    cache: BatchSource[T],
    batches: Iterable[Sequence[int] | NDArray[np.int64]],
    *,
    draw_sets: Iterable[int] | None = None,
    num_threads: int = NUM_THREADS,
    depth: int = DEPTH,
) -> Generator[T, None, None]:
    """Yields `cache.read_many(indices)` for each item of `batches`, in order, reading `depth` in advance.

    `draw_sets`: one `draw_set` per batch, such as the epoch; None: 0 for all. An error is raised when the
    batch that it occurred in is requested. The threads end with the iterator.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(num_threads, "prefetch")
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
    """Yields batches of some samples (None: of all) in shuffled order, epoch after epoch.

    `steps` are batch numbers: `range(s, n)` resumes exactly where `range(s)` ended. `batch_size` counts the
    samples over all ranks; this rank gets every `num_ranks`-th of them, so batches hold the same samples
    for any number of ranks. storage/reader/shuffle.py describes the order. If a cache has several draw
    sets, each epoch reads the next one. Errors: ValueError if a rank would get no sample.
    """
    if not 0 <= rank < num_ranks <= batch_size:
        raise ValueError(
            f"rank {rank} of {num_ranks} with batch_size {batch_size}: expected 0 <= rank < num_ranks <= batch_size"
        )
    chosen = np.arange(cache.num_samples) if indices is None else np.asarray(indices, np.int64)
    order = cache.shuffle(chosen, window_rows=window_rows)
    mine = (chosen[order.batch(step, batch_size, seed=seed)][rank::num_ranks] for step in steps)
    epochs = (step * batch_size // len(order) for step in steps)
    return prefetch_batches(cache, mine, draw_sets=epochs, num_threads=num_threads, depth=depth)
