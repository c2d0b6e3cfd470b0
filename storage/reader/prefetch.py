"""Prefetches batches of samples for training: threads read and decode them before they are requested.

Arrow, zstd and NumPy release Python's lock while they work, so a few threads keep up with a training
loop whose order of samples is known in advance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.reader.cache import Cache
from storage.reader.shuffle import WINDOW_ROWS
from storage.records.sample_batch import SampleBatch

Item = TypeVar("Item")
Read = TypeVar("Read")
NUM_THREADS = 2
DEPTH = 4  # batches that are read in advance


def prefetch(
    read: Callable[[Item], Read], items: Iterable[Item], *, num_threads: int = NUM_THREADS, depth: int = DEPTH
) -> Generator[Read, None, None]:
    """Yields `read(item)` for each item, in order, such as `cache.read_many` of lists of positions.

    Threads read `depth` items in advance; they end with the iterator. An error is raised when the item that it
    occurred in is requested.
    """
    waiting: deque[Future[Read]] = deque()
    pool = ThreadPoolExecutor(num_threads, "prefetch")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
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
    mine = ((step, chosen[order.batch(step, batch_size, seed=seed)][rank::num_ranks]) for step in steps)

    def read(batch: tuple[int, NDArray[np.int64]]) -> SampleBatch:
        step, positions = batch
        return cache.read_many(positions, draw_set=step * batch_size // len(order))

    return prefetch(read, mine, num_threads=num_threads, depth=depth)
