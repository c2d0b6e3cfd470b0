"""Sparse rows of the teacher's distribution: ragged (CSR), exact entries first, then sampled ones.

Legend: r rows, k entries of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEAD_TOLERANCE = 1e-3  # probability; how far exact entries may sum from 1 - tail before a row is refused
LOGPROB_TOLERANCE = 1e-4  # nats above 0 that float32 rounding of a log-softmax may cause

_DTYPES = {
    "offsets": np.int64,
    "ids": np.int32,
    "logprobs": np.float32,
    "num_exact": np.int32,
    "tail_mass": np.float32,
    "entropy": np.float32,
    "log_sum_exp": np.float32,
    "label_logprob": np.float32,
}


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Sparse rows of next-token distributions: temperature 1, real vocabulary, natural logarithm.

    Row i has the entries offsets[i] : offsets[i + 1]. The first num_exact[i] of them are exact: log p in
    descending order. The others are sampled, in ascending order of id: the log of their weight, which is
    the number of draws times tau. The expected weights are the probabilities of the row's tail.

    Legend: r rows, k stored entries of all rows, t temperatures besides 1. Memory: `num_bytes`.
    """

    offsets: NDArray[np.int64]  # (r + 1,)
    ids: NDArray[np.int32]  # (k,)
    logprobs: NDArray[np.float32]  # (k,)
    num_exact: NDArray[np.int32]  # (r,)
    tail_mass: NDArray[np.float32]  # (r,) probability of everything that is not an exact entry
    entropy: NDArray[np.float32]  # (r,) nats, of the full distribution
    log_sum_exp: NDArray[np.float32]  # (r, t) of log p / T at each of the t configured temperatures T
    label_logprob: NDArray[np.float32] | None = None  # (r,) of the label token; None for visual rows
    other_sets: tuple[SparseRows, ...] = ()  # the same rows with other draws of their tails; a reader gives one set
    selection_error: NDArray[np.float32] | None = None  # (r,) ||entries - p||_2; a cache keeps its summary alone

    @property
    def num_rows(self) -> int:
        """r, the number of rows."""
        return len(self.offsets) - 1

    @property
    def num_entries(self) -> int:
        """k, the stored entries of all rows."""
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """The size of all arrays in bytes."""
        return sum(array.nbytes for array in self._arrays().values()) + sum(each.num_bytes for each in self.other_sets)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def row_of_entry(self) -> NDArray[np.int64]:
        """Returns (k,) the row that each entry belongs to."""
        return np.repeat(np.arange(self.num_rows, dtype=np.int64), np.diff(self.offsets))

    def is_exact(self) -> NDArray[np.bool_]:
        """Returns (k,) True for exact entries, False for sampled ones."""
        end_of_exact = self.offsets[:-1] + self.num_exact
        return np.arange(self.num_entries) < np.repeat(end_of_exact, np.diff(self.offsets))

    def equals(self, other: SparseRows) -> bool:
        """Returns True if all stored arrays are equal bit for bit; `selection_error` is not compared."""
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in _DTYPES) and (
            len(self.other_sets) == len(other.other_sets)
            and all(ours.equals(theirs) for ours, theirs in zip(self.other_sets, other.other_sets, strict=True))
        )

    def slice(self, start: int, stop: int) -> SparseRows:
        """Returns rows start : stop as views. IndexError unless 0 <= start <= stop <= num_rows."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start}:{stop}: expected a range within 0:{self.num_rows}")
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return SparseRows(
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            logprobs=self.logprobs[first:last],
            num_exact=self.num_exact[start:stop],
            tail_mass=self.tail_mass[start:stop],
            entropy=self.entropy[start:stop],
            log_sum_exp=self.log_sum_exp[start:stop],
            label_logprob=None if self.label_logprob is None else self.label_logprob[start:stop],
            other_sets=tuple(each.slice(start, stop) for each in self.other_sets),
            selection_error=None if self.selection_error is None else self.selection_error[start:stop],
        )

    def copy(self) -> SparseRows:
        """Returns a copy with arrays of its own; a slice keeps the arrays it was cut from in memory."""
        copies: dict[str, Any] = {name: array.copy() for name, array in self._arrays().items()}
        return replace(self, **copies, other_sets=tuple(each.copy() for each in self.other_sets))

    @staticmethod
    def gather(pieces: Sequence[RowSpan]) -> SparseRows:
        """Joins rows start : stop of each (rows, start, stop) into new arrays; empty rows if there are no pieces.

        Equal to concatenating slices, in half the time. Errors: ValueError if only some pieces have label
        logprobs.
        """
        if not pieces:
            return SparseRows.empty()
        sizes = [stop - start for _, start, stop in pieces]
        firsts = [int(rows.offsets[start]) for rows, start, _ in pieces]
        lasts = [int(rows.offsets[stop]) for rows, _, stop in pieces]
        moved = np.cumsum([0, *map(int.__sub__, lasts, firsts)], dtype=np.int64)[:-1] - np.array(firsts, np.int64)
        ends = np.concatenate([rows.offsets[start + 1 : stop + 1] for rows, start, stop in pieces], dtype=np.int64)
        entries = list(zip((rows for rows, _, _ in pieces), firsts, lasts, strict=True))
        labelled = [(rows.label_logprob, start, stop) for rows, start, stop in pieces if rows.label_logprob is not None]
        if 0 < len(labelled) < len(pieces):
            raise ValueError(f"{len(labelled)} of {len(pieces)} pieces have label logprobs, expected all or none")
        return SparseRows(
            offsets=np.concatenate([np.zeros(1, np.int64), ends + np.repeat(moved, sizes)]),
            ids=np.concatenate([rows.ids[first:last] for rows, first, last in entries]),
            logprobs=np.concatenate([rows.logprobs[first:last] for rows, first, last in entries]),
            num_exact=np.concatenate([rows.num_exact[start:stop] for rows, start, stop in pieces]),
            tail_mass=np.concatenate([rows.tail_mass[start:stop] for rows, start, stop in pieces]),
            entropy=np.concatenate([rows.entropy[start:stop] for rows, start, stop in pieces]),
            log_sum_exp=np.concatenate([rows.log_sum_exp[start:stop] for rows, start, stop in pieces]),
            label_logprob=np.concatenate([labels[start:stop] for labels, start, stop in labelled])
            if labelled
            else None,
        )

    @staticmethod
    def concatenate(parts: Sequence[SparseRows]) -> SparseRows:
        """Joins the rows of all parts into new arrays; returns empty rows if there are no parts.

        Errors: ValueError if only some parts have label logprobs or selection errors, or if their numbers
        of draw sets differ.
        """
        if not parts:
            return SparseRows.empty()
        labels = _require_all_or_none([part.label_logprob for part in parts], "label logprobs")
        errors = _require_all_or_none([part.selection_error for part in parts], "selection errors")
        others = zip(*(part.other_sets for part in parts), strict=True)  # ValueError for other numbers of sets
        starts = np.cumsum([0] + [part.num_entries for part in parts[:-1]])
        shifted = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
        return SparseRows(
            offsets=np.concatenate([np.zeros(1, np.int64), *shifted]),
            ids=np.concatenate([part.ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            num_exact=np.concatenate([part.num_exact for part in parts]),
            tail_mass=np.concatenate([part.tail_mass for part in parts]),
            entropy=np.concatenate([part.entropy for part in parts]),
            log_sum_exp=np.concatenate([part.log_sum_exp for part in parts]),
            label_logprob=np.concatenate(labels) if labels else None,
            other_sets=tuple(SparseRows.concatenate(each) for each in others),
            selection_error=np.concatenate(errors) if errors else None,
        )

    @staticmethod
    def empty(*, with_labels: bool = False, num_temperatures: int = 0) -> SparseRows:
        """Returns an object with zero rows."""
        zero = np.zeros(0, np.float32)
        return SparseRows(
            offsets=np.zeros(1, np.int64),
            ids=np.zeros(0, np.int32),
            logprobs=zero,
            num_exact=np.zeros(0, np.int32),
            tail_mass=zero,
            entropy=zero,
            log_sum_exp=np.zeros((0, num_temperatures), np.float32),
            label_logprob=zero if with_labels else None,
        )

    def validate(self, vocab_size: int) -> None:
        """Raises ValueError, naming the first faulty row, unless a cache may store these rows."""
        for number, other in enumerate(self.other_sets, start=1):
            if other.other_sets or not self._has_same_head(other):
                raise ValueError(f"set {number} of draws is of other rows than set 0")
            other.validate(vocab_size)
        self._check_shapes()
        self._check_scalars()
        exact, row = self.is_exact(), self.row_of_entry()
        in_vocabulary = (self.ids >= 0) & (self.ids < vocab_size)
        _check_rows(in_vocabulary, f"an id is outside 0..{vocab_size - 1}", row)
        _check_rows(np.isfinite(self.logprobs), "a logprob is not finite", row)
        _check_rows(~exact | (self.logprobs <= LOGPROB_TOLERANCE), "an exact logprob is above 0", row)
        same_row = row[1:] == row[:-1]
        falling = self.logprobs[1:] <= self.logprobs[:-1]
        _check_rows(~(same_row & exact[1:]) | falling, "exact logprobs are not in descending order", row[1:])
        ascending = self.ids[1:] > self.ids[:-1]
        _check_rows(~(same_row & ~exact[:-1]) | ascending, "sampled ids are not ascending", row[1:])
        keys = np.sort(row * vocab_size + self.ids)
        _check_rows(keys[1:] != keys[:-1], "an id appears twice", keys[1:] // vocab_size)
        head = np.bincount(row[exact], np.exp(self.logprobs[exact].astype(np.float64)), self.num_rows)
        gap = np.abs(head - (1.0 - self.tail_mass.astype(np.float64)))
        _check_rows(gap <= HEAD_TOLERANCE, "exact entries and tail mass do not sum to 1")
        _check_rows((self.num_exact == 0) | (self.tail_mass < 1), "the tail mass is 1 although exact entries exist")

    def _has_same_head(self, other: SparseRows) -> bool:
        """True if the exact entries and the tail masses are the same."""
        ours, theirs = self.is_exact(), other.is_exact()
        return (
            np.array_equal(self.num_exact, other.num_exact)
            and np.array_equal(self.ids[ours], other.ids[theirs])
            and np.array_equal(self.logprobs[ours], other.logprobs[theirs])
            and np.array_equal(self.tail_mass, other.tail_mass)
        )

    def _check_shapes(self) -> None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array is None and name == "label_logprob":
                continue
            ndim = 2 if name == "log_sum_exp" else 1
            if not isinstance(array, np.ndarray) or array.ndim != ndim or array.dtype != dtype:
                got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
                raise ValueError(f"{name} must be a {ndim}-d array of {np.dtype(dtype)}, got {got}")
        if len(self.offsets) == 0 or self.offsets[0] != 0:
            raise ValueError("offsets must start with 0")
        if (np.diff(self.offsets) < 0).any():
            raise ValueError("offsets must not decrease")
        if not self.offsets[-1] == len(self.ids) == len(self.logprobs):
            raise ValueError(
                f"offsets end at {self.offsets[-1]}, but there are {len(self.ids)} ids "
                f"and {len(self.logprobs)} logprobs"
            )
        for name in ("num_exact", "tail_mass", "entropy", "log_sum_exp", "label_logprob"):
            array = getattr(self, name)
            if array is not None and len(array) != self.num_rows:
                raise ValueError(f"{name} has {len(array)} values for {self.num_rows} rows")
        _check_rows((self.num_exact >= 0) & (self.num_exact <= np.diff(self.offsets)), "num_exact is wrong")

    def _check_scalars(self) -> None:
        check_scalars(
            tail_mass=self.tail_mass,
            entropy=self.entropy,
            log_sum_exp=self.log_sum_exp,
            label_logprob=self.label_logprob,
        )


RowSpan = tuple[SparseRows, int, int]  # the rows start : stop of some rows


def check_scalars(
    *,
    tail_mass: NDArray[np.float32],
    entropy: NDArray[np.float32],
    log_sum_exp: NDArray[np.float32],
    label_logprob: NDArray[np.float32] | None,
) -> None:
    """Raises ValueError, naming the first faulty row, unless these are valid scalars of rows."""
    # A comparison with NaN is False, so each check also refuses NaN.
    _check_rows((tail_mass >= 0) & (tail_mass <= 1), "the tail mass is outside 0..1")
    _check_rows(np.isfinite(entropy) & (entropy >= -LOGPROB_TOLERANCE), "the entropy is negative or not finite")
    _check_rows(np.asarray(np.isfinite(log_sum_exp).all(axis=1)), "a log-sum-exp is not finite")
    if label_logprob is not None:
        labels = np.isfinite(label_logprob) & (label_logprob <= LOGPROB_TOLERANCE)
        _check_rows(labels, "the label logprob is above 0 or not finite")


def check_sampled_total(rows: SparseRows, tau: float) -> None:
    """Raises ValueError unless each row's sampled weights sum to its tail mass within one draw (tau).

    Systematic draws guarantee that. With tau 0, rows have exact entries only and nothing is checked.
    """
    if tau <= 0:
        return
    sampled = ~rows.is_exact()
    weight = np.exp(rows.logprobs[sampled].astype(np.float64))
    check_sampled_weights(np.bincount(rows.row_of_entry()[sampled], weight, rows.num_rows), rows.tail_mass, tau)


def check_sampled_weights(weights: NDArray[Any], tail_mass: NDArray[np.float32], tau: float) -> None:
    """Raises ValueError unless `weights`, (r,) sums of sampled weights, equal the tail masses within tau."""
    gap = np.abs(weights - tail_mass)
    if (gap > tau + HEAD_TOLERANCE).any():
        row = int(np.argmax(gap))
        raise ValueError(
            f"row {row}: sampled weights differ by {gap[row]:.6g} from the tail mass "
            f"{tail_mass[row]:.6g}, expected at most tau = {tau}"
        )


def _require_all_or_none(arrays: Sequence[NDArray | None], what: str) -> list[NDArray]:
    there = [array for array in arrays if array is not None]
    if 0 < len(there) < len(arrays):
        raise ValueError(f"{len(there)} of {len(arrays)} parts have {what}, expected all or none")
    return there


def _is_same(a: NDArray | None, b: NDArray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _check_rows(good: NDArray[np.bool_], problem: str, row: NDArray[np.int64] | None = None) -> None:
    """Raises ValueError naming the row of the first False; `row`: the row of each position, if not itself."""
    if not good.all():
        position = int(np.argmin(good))
        raise ValueError(f"row {position if row is None else int(row[position])}: {problem}")
