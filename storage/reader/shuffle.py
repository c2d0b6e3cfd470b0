"""The order in which samples are read for training: shuffled so that each row group is decoded about once an epoch.

A cache larger than memory cannot be read in any order: a random one decodes a whole row group for every sample.
So neighbouring samples form blocks, whole row groups of a part; an epoch puts the blocks into a random order,
one after another on a line as long as all their rows, and throws each sample to a random place at most half a
window from the middle of its block. Samples are read in the order of their places: at any time those of about a
window of rows are mixed, from blocks of anywhere, and only these need be in memory.

Where all rows are within one window the order is a plain permutation. It depends on the cache, the samples, seed,
epoch and window alone: not on families, ranks, workers or memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from storage.encoding.distributions import ROWS_PER_GROUP

WINDOW_ROWS = 1 << 19  # some 140 MB of text rows
# Beside whole row groups of responses a block reads those of tokens and images that it shares with its neighbours.
BLOCK_ROWS = 1 << 15
_KEPT_EPOCHS = 2  # a batch may run over the end of one


def cut_blocks(
    part_of: NDArray[np.int64], num_response_rows: NDArray[np.int32], num_visual_tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(s,) the block of each sample of a cache, from 0: runs of samples of one part, of BLOCK_ROWS or a little more.

    A block ends where a row group of the family response does (distributions.encode_groups), or with its part.
    """
    blocks = np.zeros(len(part_of), np.int64)
    responses = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_response_rows, dtype=np.int64)])
    rows = responses + np.concatenate([np.zeros(1, np.int64), np.cumsum(num_visual_tokens, dtype=np.int64)])
    start, first, block = 0, 0, 0  # of the row group, of the block
    while start < len(part_of):
        end_of_part = int(np.searchsorted(part_of, part_of[start], side="right"))
        full = int(np.searchsorted(responses, responses[start] + ROWS_PER_GROUP, side="right")) - 1
        start = min(max(full, start + 1), end_of_part)
        if start == end_of_part or rows[start] - rows[first] >= BLOCK_ROWS:
            blocks[first:start] = block
            first, block = start, block + 1
    return blocks


def piece(epoch: Callable[[int], NDArray[np.int64]], epoch_size: int, start: int, size: int) -> NDArray[np.int64]:
    """(size,) positions `start` and on of the endless sequence of epochs, of `epoch_size` each."""
    epochs = range(start // epoch_size, (start + size - 1) // epoch_size + 1)
    within = start - epochs[0] * epoch_size
    return np.concatenate([epoch(number) for number in epochs])[within : within + size]


class Shuffle:
    """The endless sequence of shuffled epochs of some samples. Positions are those of the samples as they were given.

    Invariant: every epoch has each position once.
    """

    def __init__(
        self, block_of: NDArray[np.int64], block_rows: NDArray[np.int64], *, window_rows: int = WINDOW_ROWS
    ) -> None:
        """`block_of` (s,) of the samples; `block_rows` (blocks,) of all blocks, read or not.

        ValueError for no samples or an empty window.
        """
        if not len(block_of) or window_rows < 1:
            raise ValueError(
                f"{len(block_of)} samples and a window of {window_rows} rows; expected one or more of each"
            )
        used, self._block_of = np.unique(block_of, return_inverse=True)
        self._block_rows = block_rows[used].astype(np.float64)
        self._window_rows = window_rows
        self._epochs: dict[tuple[int, int], NDArray[np.int64]] = {}

    @staticmethod
    def plain(num_samples: int) -> Shuffle:
        """Permutations of so many samples, all in one window."""
        return Shuffle(np.zeros(num_samples, np.int64), np.ones(1, np.int64))

    def __len__(self) -> int:
        return len(self._block_of)

    def epoch(self, epoch: int, *, seed: int) -> NDArray[np.int64]:
        """(s,) every position once."""
        order = self._epochs.get((seed, epoch))
        if order is None:
            order = self._shuffled(np.random.Generator(np.random.PCG64([seed, epoch])))
            order.flags.writeable = False  # it is remembered
            self._epochs[seed, epoch] = order
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
        return order

    def batch(self, step: int, size: int, *, seed: int) -> NDArray[np.int64]:
        """(size,) positions `step * size` and on of the endless sequence.

        A batch may run over the end of an epoch, and over several of a data set that is smaller than it.
        """
        return piece(lambda epoch: self.epoch(epoch, seed=seed), len(self), step * size, size)

    def _shuffled(self, random: np.random.Generator) -> NDArray[np.int64]:
        total = self._block_rows.sum()
        if total <= self._window_rows:
            return random.permutation(len(self))
        order = random.permutation(len(self._block_rows))
        middles = np.empty(len(order))
        middles[order] = np.cumsum(self._block_rows[order]) - self._block_rows[order] / 2
        places = middles[self._block_of] + (random.random(len(self)) - 0.5) * self._window_rows
        # Both ends reflect, so that samples lie as densely there as everywhere.
        places = np.abs(places)
        places = np.minimum(places, 2 * total - places)
        return np.argsort(places, kind="stable")
