"""Groups of token ids of like frequency: what makes an id cost eight bits instead of sixteen.

A part file counts how often it stores each id, sorts the ids by that, and cuts the order into groups of
about equal mass, each at most 2^w ids. An id is then a group (a symbol whose differences within a row are
entropy-coded) and a place in the group (w raw bits). The table of groups travels with the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptPartError

MAX_GROUPS = 250  # a group number, and a difference of two, fit into a byte
_GROUPS = 128  # of equal mass; 64 cost 1.5 % more bytes on text rows, 256 a larger table for nothing


@dataclass(frozen=True, eq=False)
class IdGroups:
    """Ids in an order: by group, and by id within a group. The place of an id in this order is its rank."""

    table: NDArray[np.uint8]  # (v,) group + 1 of each id; 0 for an id that no row stores

    @staticmethod
    def of_counts(counts: NDArray[np.int64]) -> IdGroups:
        """Groups for ids that are stored `counts` (v,) times."""
        order = np.lexsort((np.arange(len(counts)), -counts))
        order = order[: np.count_nonzero(counts)]
        mass = np.concatenate([[0], np.cumsum(counts[order])])
        table = np.zeros(len(counts), np.uint8)
        start, group = 0, 0
        while start < len(order):
            left = MAX_GROUPS - group
            size = 1
            while start + size < len(order) and (
                left == 1 or mass[min(start + 2 * size, len(order))] - mass[start] <= mass[-1] / _GROUPS
            ):
                size *= 2
            group += 1
            table[order[start : start + size]] = group
            start += size
        return IdGroups(table)

    @staticmethod
    def parse(table: bytes, vocab_size: int) -> IdGroups:
        """Groups from a table's bytes. Errors: CorruptPartError."""
        array = np.frombuffer(table, np.uint8)
        if len(array) != vocab_size:
            raise CorruptPartError(f"the table of id groups has {len(array)} ids, the vocabulary {vocab_size}")
        if array.max(initial=0) > MAX_GROUPS:
            raise CorruptPartError(f"the table of id groups has a group {array.max()}, at most {MAX_GROUPS} can be")
        return IdGroups(array)

    @cached_property
    def sizes(self) -> NDArray[np.int32]:
        """(g,) ids of each group."""
        return np.bincount(self.table, minlength=1)[1:].astype(np.int32)

    @cached_property
    def starts(self) -> NDArray[np.int32]:
        """(g,) rank of each group's first id."""
        return np.cumsum(self.sizes, dtype=np.int32) - self.sizes

    @cached_property
    def widths(self) -> NDArray[np.int32]:
        """(g,) bits of a place in each group."""
        return np.array([max(int(size) - 1, 0).bit_length() for size in self.sizes], np.int32)

    @cached_property
    def first_partial(self) -> int:
        """The first group with fewer ids than its places have values; `of_counts` makes none but the last so."""
        is_partial = self.sizes != 1 << self.widths
        return int(np.argmax(is_partial)) if is_partial.any() else len(self.sizes)

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """The id at each rank."""
        order = np.argsort(self.table, kind="stable")
        return order[np.count_nonzero(self.table == 0) :].astype(np.int32)

    @property
    def num_bytes(self) -> int:
        """What a reader keeps of it in memory."""
        return 5 * len(self.table)

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """(v,) the rank of each id; -1 for one that no row stores."""
        ranks = np.full(len(self.table), -1, np.int32)
        ranks[self.ids] = np.arange(len(self.ids), dtype=np.int32)
        return ranks
