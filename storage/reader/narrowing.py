"""Reads fewer entries per row than a cache stores, so one dump serves smaller k and higher thresholds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError
from storage.records.sparse_rows import SparseRows
from storage.selection import Selection, Threshold, TopK


@dataclass(frozen=True)
class Narrowing:
    """The entries to keep of each row: exactly one of `k` and `tau` is given."""

    k: int | None = None  # keeps the k most probable exact entries and no sampled ones
    tau: float | None = None  # keeps entries with p >= tau; draws the others with weight tau

    @staticmethod
    def of(*, k: int | None, tau: float | None) -> Narrowing | None:
        """Returns the narrowing, or None if both are None. ValueError if both are given or out of range."""
        if k is not None and tau is not None:
            raise ValueError(f"k is {k} and tau is {tau:g}; give only one of them")
        if k is not None and k < 1:
            raise ValueError(f"k is {k}, expected 1 or more")
        if tau is not None and not 0 < tau < 1:
            raise ValueError(f"tau is {tau:g}, expected a probability between 0 and 1")
        return None if k is None and tau is None else Narrowing(k, tau)

    def check(self, selection: Selection | None, place: str) -> None:
        """Raises ConfigError if rows of this selection (see `stored_selection`) cannot be narrowed so."""
        if self.k is not None and selection and not selection.keeps_exact:
            raise ConfigError(f"{place}: k is {self.k}, but rows selected by {selection.name!r} keep no entry exactly")
        if self.k is not None and isinstance(selection, TopK) and self.k > selection.k:
            raise ConfigError(f"{place}: k is {self.k}, but the cache keeps the {selection.k} largest of a row")
        if self.tau is not None and not isinstance(selection, Threshold):
            method = selection and selection.name
            raise ConfigError(f"{place}: tau is {self.tau:g}, but the cache's rows were selected by {method!r}")
        if self.tau is not None and isinstance(selection, Threshold) and self.tau < selection.tau:
            raise ConfigError(f"{place}: tau is {self.tau:g}, but the cache was dumped with {selection.tau:g}")


def narrow_rows(rows: SparseRows, to: Narrowing, uniforms: NDArray[np.float64]) -> SparseRows:
    """Returns the rows with fewer entries; dropped exact entries join the tail, other scalars stay.

    With `to.tau`, the remaining entries are drawn systematically by their weights, each draw with weight
    tau; `uniforms`, (r,) in [0, 1), shift the draws. The expected row is still the dense row.
    """
    exact, row = rows.is_exact(), rows.row_of_entry()
    if to.k is not None:
        place = np.arange(rows.num_entries) - rows.offsets[row]
        return _select_entries(rows, exact & (place < to.k), np.zeros(rows.num_entries, np.int64), weight=1.0)
    assert to.tau is not None
    weights = np.exp(rows.logprobs.astype(np.float64))
    kept = exact & (weights >= to.tau)
    return _select_entries(
        rows, kept, _count_draws(np.where(kept, 0.0, weights), rows, to.tau, uniforms), weight=to.tau
    )


def _count_draws(
    weights: NDArray[np.float64], rows: SparseRows, tau: float, uniforms: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Returns (k,) how often each entry is drawn: systematic draws every tau, shifted by the row's uniform."""
    sums = np.concatenate([np.zeros(1), np.cumsum(weights)])
    sizes = np.diff(rows.offsets)
    before = np.repeat(sums[rows.offsets[:-1]], sizes)
    shift = np.repeat(uniforms, sizes)
    until, up_to = (np.ceil((each - before) / tau - shift) for each in (sums[:-1], sums[1:]))
    return (np.maximum(up_to, 0) - np.maximum(until, 0)).astype(np.int64)


def _select_entries(
    rows: SparseRows, kept: NDArray[np.bool_], counts: NDArray[np.int64], *, weight: float
) -> SparseRows:
    """Returns rows with the `kept` exact entries and with the entries drawn `counts` times."""
    row, drawn = rows.row_of_entry(), counts > 0
    head, tail = np.flatnonzero(kept), np.flatnonzero(drawn)
    tail = tail[np.argsort((row[tail] << 31) | rows.ids[tail])]
    order = np.argsort(np.concatenate([row[head] * 2, row[tail] * 2 + 1]), kind="stable")
    logprobs = np.concatenate([rows.logprobs[head], np.log(counts[tail] * weight).astype(np.float32)])
    num_exact = np.bincount(row[head], minlength=rows.num_rows)
    num_sampled = np.bincount(row[tail], minlength=rows.num_rows)
    lost = rows.is_exact() & ~kept
    lost_mass = np.bincount(row[lost], np.exp(rows.logprobs[lost].astype(np.float64)), rows.num_rows)
    tail_mass = np.where(num_exact > 0, np.minimum(rows.tail_mass + lost_mass, 1 - 2.0**-24), 1.0)
    return replace(
        rows,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(num_exact + num_sampled)]),
        ids=np.concatenate([rows.ids[head], rows.ids[tail]])[order],
        logprobs=logprobs[order],
        num_exact=num_exact.astype(np.int32),
        tail_mass=tail_mass.astype(np.float32),
        other_sets=(),
        selection_error=None,
    )
