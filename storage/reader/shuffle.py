"""Shuffles samples for training such that each row group is decoded about once per epoch.

A fully random order over a cache larger than memory would decode a whole row group for every sample.
Therefore neighbouring samples form blocks of whole row groups. An epoch places the blocks in random
order on a line whose length is the number of rows, and moves each sample by a random distance of at
most half a window from the middle of its block. Samples are read in the order of their positions on
the line: about one window of rows, from blocks anywhere in the cache, is mixed and in memory at a time.

If all rows fit into one window, the order is a plain permutation. The order depends only on the cache,
the samples, seed, epoch and window: not on families, ranks, workers or memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from storage.encoding.distributions import ROWS_PER_GROUP

WINDOW_ROWS = 1 << 19  # some 140 MB of text rows
# A block also reads row groups of tokens and images that it shares with its neighbours; hence not smaller.
BLOCK_ROWS = 1 << 15
_KEPT_EPOCHS = 2  # a batch may span two epochs


def cut_blocks(
    part_of: NDArray[np.int64], num_response_rows: NDArray[np.int32], num_visual_tokens: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns (s,) the block number of each sample of a cache, from 0.

    A block is a run of samples of one part with BLOCK_ROWS rows or slightly more. It ends at the end of a
    row group of the family response (distributions.encode_groups) or of the part.
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


def slice_epochs(
    epoch: Callable[[int], NDArray[np.int64]], epoch_size: int, start: int, size: int
) -> NDArray[np.int64]:
    """Returns (size,) items `start` : `start + size` of all epochs joined; each has `epoch_size` items."""
    epochs = range(start // epoch_size, (start + size - 1) // epoch_size + 1)
    within = start - epochs[0] * epoch_size
    return np.concatenate([epoch(number) for number in epochs])[within : within + size]


class Shuffle:
    """An endless sequence of shuffled epochs over some samples, which are named by their positions.

    Invariant: every epoch contains each position exactly once.
    """

    def __init__(
        self, block_of: NDArray[np.int64], block_rows: NDArray[np.int64], *, window_rows: int = WINDOW_ROWS
    ) -> None:
        """`block_of`: (s,) the block of each sample; `block_rows`: (blocks,) the rows of every block.

        Errors: ValueError for no samples or an empty window.
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
        """Returns a shuffle whose epochs are plain permutations of `num_samples` samples."""
        return Shuffle(np.zeros(num_samples, np.int64), np.ones(1, np.int64))

    def __len__(self) -> int:
        return len(self._block_of)

    def epoch(self, epoch: int, *, seed: int) -> NDArray[np.int64]:
        """Returns (s,) every position once, in the order of this epoch; read-only."""
        order = self._epochs.get((seed, epoch))
        if order is None:
            order = self._make_order(np.random.Generator(np.random.PCG64([seed, epoch])))
            order.flags.writeable = False  # it is cached
            self._epochs[seed, epoch] = order
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
        return order

    def batch(self, step: int, size: int, *, seed: int) -> NDArray[np.int64]:
        """Returns (size,) the positions of batch `step`: items from `step * size` on of all epochs joined.

        A batch may span the end of an epoch, and several epochs if it has more samples than the data set.
        """
        return slice_epochs(lambda epoch: self.epoch(epoch, seed=seed), len(self), step * size, size)

    def _make_order(self, random: np.random.Generator) -> NDArray[np.int64]:
        total = self._block_rows.sum()
        if total <= self._window_rows:
            return random.permutation(len(self))
        order = random.permutation(len(self._block_rows))
        middles = np.empty(len(order))
        middles[order] = np.cumsum(self._block_rows[order]) - self._block_rows[order] / 2
        line_positions = middles[self._block_of] + (random.random(len(self)) - 0.5) * self._window_rows
        # Reflect at both ends, so that the density of samples is the same everywhere.
        line_positions = np.abs(line_positions)
        line_positions = np.minimum(line_positions, 2 * total - line_positions)
        return np.argsort(line_positions, kind="stable")
