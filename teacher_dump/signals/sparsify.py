"""Selects the sparse rows that a cache stores from dense logits.

Legend: r rows, v vocabulary, k stored entries of all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from storage.records.sparse_rows import SparseRows
from storage.selection import Mass, Sampled, Selection, Threshold, TopK
from teacher_dump.signals.tail_sampling import (
    RUN,
    Draws,
    draw_independently,
    draw_systematically,
    gather_run_weights,
    sum_runs,
)

# Dense entries processed together: as many as a CPU's caches hold, enough to keep a GPU busy.
_BLOCK_ENTRIES = {"cpu": 2**20, "gpu": 2**26}


def make_row_uniforms(num_rows: int, *, seed: int, family: str, key: str, num_sets: int = 1) -> NDArray[np.float64]:
    """Returns uniform random numbers for a sample's or an image's rows, (r, sets) in [0, 1); a retry gets the same.

    They depend only on the selection's seed, the family, the sample id or image key, and the set's number.
    """
    columns = []
    for number in range(num_sets):
        of_set = f"{seed}.{number}" if number else f"{seed}"
        digest = hashlib.sha256(f"stillhouse draws 1\0{of_set}\0{family}\0{key}".encode()).digest()
        columns.append(np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).random(num_rows))
    return np.stack(columns, axis=1)


def select_rows(
    logits: Float[Tensor, "r v"],
    *,
    labels: Int[Tensor, " r"] | None,
    selection: Selection,
    uniforms: NDArray[np.float64],
    temperatures: Sequence[float] = (),
    tail_total: Float[Tensor, " v"] | None = None,
) -> SparseRows:
    """Selects each row's stored entries, and computes its scalars over the full vocabulary, from float32 logits.

    Each of `temperatures` gets a log-sum-exp. `uniforms` (r, sets), or (r,) for one set, in [0, 1) decide the draws
    of `Threshold` and `Sampled`, one set of draws for each column. Adds the probabilities outside the exact entries
    of all rows to `tail_total` (float64). Raises ValueError for logits that are not finite.
    """
    num_rows, vocab_size = logits.shape
    uniforms = uniforms if uniforms.ndim == 2 else uniforms[:, None]
    most = max(1, _BLOCK_ENTRIES["cpu" if logits.device.type == "cpu" else "gpu"] // vocab_size)
    per_block = -(-num_rows // max(1, -(-num_rows // most))) or 1  # blocks of nearly equal size
    blocks = []
    for start in range(0, max(num_rows, 1), per_block):
        block = slice(start, start + per_block)
        dense = _DenseRows.from_logits(logits[block])
        own = None if labels is None else labels[block]
        blocks.append(_select(dense, own, selection, uniforms[block], temperatures, tail_total))
    return SparseRows.concatenate(blocks)


@dataclass(frozen=True, eq=False)
class _DenseRows:
    """Rows of logits minus their maximum, and the sums that every scalar needs. p = weights / total."""

    shifted: Float[Tensor, "r v"]
    weights: Float[Tensor, "r v"]  # exp(shifted)
    sums: Float[Tensor, "r n"]  # of weights, by run
    total: Float[Tensor, " r"]
    log_total: Float[Tensor, " r"]  # log p = shifted - log_total

    @staticmethod
    def from_logits(logits: Tensor) -> _DenseRows:
        shifted = logits - logits.amax(dim=1, keepdim=True)
        weights = shifted.exp()
        sums = sum_runs(weights)
        total = sums.sum(dim=1)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("logits are not finite")
        return _DenseRows(shifted, weights, sums, total, total.log())

    def entropy(self) -> Tensor:
        """Returns the entropy, (r,) nats: the logarithm of the total minus the mean of `shifted`."""
        products = self.shifted * self.weights
        sums = products.sum(dim=1)
        if not bool(torch.isfinite(sums).all()):  # a suppressed token: 0 times minus infinity
            sums = products.nansum(dim=1)
        return (self.log_total - sums / self.total).clamp_(min=0)

    def remove_entries(self, places: Tensor) -> None:
        """Sets weights at places in the flat rows to 0; `shifted` and both totals do not change."""
        vocab_size = self.weights.shape[1]
        self.weights.view(-1)[places] = 0.0
        row, run = places // vocab_size, places % vocab_size // RUN
        self.sums[row, run] = gather_run_weights(self.weights, row, run).sum(dim=1)


def _select(
    dense: _DenseRows,
    labels: Tensor | None,
    selection: Selection,
    uniforms: NDArray[np.float64],
    temperatures: Sequence[float],
    tail_total: Tensor | None,
) -> SparseRows:
    num_rows, vocab_size = dense.weights.shape
    label_logprob = None if labels is None else dense.shifted.gather(1, labels[:, None])[:, 0] - dense.log_total
    log_sum_exp = _compute_log_sum_exps(dense, temperatures)
    places = _find_exact_places(dense, selection)  # (k,) in the flat rows
    logprobs = dense.shifted.view(-1)[places] - dense.log_total[places // vocab_size]
    head = _Entries(_to_numpy(places // vocab_size), _to_numpy(places % vocab_size), _to_numpy(logprobs)).sort()
    entropy = dense.entropy()
    dense.remove_entries(places)
    tail = dense.weights
    tail_mass = dense.sums.sum(dim=1) / dense.total  # summed itself: 1 - head would lose small tails
    if tail_total is not None:
        tail_total += tail.T @ dense.total.reciprocal()
    tail_norm = _to_numpy(torch.linalg.vector_norm(tail, dim=1) / dense.total).astype(np.float64)
    sets = []
    for column in uniforms.T:
        sampled = _draw_entries(dense, selection, column)
        offsets, entries, num_exact = _interleave(head, sampled, num_rows)
        rows = SparseRows(
            offsets=offsets,
            ids=entries.ids.astype(np.int32),
            logprobs=entries.logprobs.astype(np.float32),
            num_exact=num_exact,
            tail_mass=np.minimum(_to_numpy(tail_mass).astype(np.float32), np.float32(1)),
            entropy=_to_numpy(entropy).astype(np.float32),
            log_sum_exp=log_sum_exp,
            label_logprob=None if label_logprob is None else _to_numpy(label_logprob).astype(np.float32),
            selection_error=_compute_distance(tail, dense.total, tail_norm, sampled),
        )
        sets.append(rows)
    return replace(sets[0], other_sets=tuple(sets[1:]))


def _draw_entries(dense: _DenseRows, selection: Selection, uniforms: NDArray[np.float64]) -> _Entries:
    """Draws one set of entries from the remaining weights; none for a selection that does not draw."""
    if isinstance(selection, Threshold):
        unit = selection.tau * dense.total
        drawn = draw_systematically(dense.weights, unit=unit, uniforms=uniforms, sums=dense.sums)
        return _Entries.from_draws(drawn, weight=selection.draw_weight)
    if isinstance(selection, Sampled):
        drawn = draw_independently(dense.weights, num_draws=selection.draws, uniforms=uniforms)
        return _Entries.from_draws(drawn, weight=selection.draw_weight)
    return _Entries.empty()


def _compute_distance(
    tail: Tensor, total: Tensor, tail_norm: NDArray[np.float64], sampled: _Entries
) -> NDArray[np.float32]:
    """Returns the Euclidean distance of each row's entries from the dense row, (r,); exact entries add 0."""
    squares = tail_norm**2
    if len(sampled.ids):
        places = torch.from_numpy(sampled.rows * tail.shape[1] + sampled.ids).to(tail.device)
        missed = (
            _to_numpy(tail.reshape(-1)[places]).astype(np.float64) / _to_numpy(total).astype(np.float64)[sampled.rows]
        )
        change = (np.exp(sampled.logprobs.astype(np.float64)) - missed) ** 2 - missed**2
        squares = squares + np.bincount(sampled.rows, change, len(squares))
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def _find_exact_places(dense: _DenseRows, selection: Selection) -> Tensor:
    """Returns the positions of the exactly stored entries in the flat rows, (k,)."""
    num_rows, vocab_size = dense.weights.shape
    first = torch.arange(num_rows, device=dense.weights.device)[:, None] * vocab_size
    if isinstance(selection, Threshold):
        least = selection.tau * dense.total
        row, run = (dense.sums >= least[:, None]).nonzero(as_tuple=True)  # no run weighs less than its tokens
        at, token = (gather_run_weights(dense.weights, row, run) >= least[row, None]).nonzero(as_tuple=True)
        return row[at] * vocab_size + run[at] * RUN + token
    if isinstance(selection, Sampled):
        return first.new_zeros(0)
    if isinstance(selection, Mass):
        falling, order = dense.weights.sort(dim=1, descending=True, stable=True)
        before = falling.double().cumsum(dim=1) - falling
        wanted = (before < selection.mass * dense.total[:, None]) & (falling > 0)
        return (first + order)[wanted]
    assert isinstance(selection, TopK)
    ids = dense.shifted.topk(min(selection.k, vocab_size), dim=1).indices
    return (first + ids)[torch.isfinite(dense.shifted.gather(1, ids))]


def _compute_log_sum_exps(dense: _DenseRows, temperatures: Sequence[float]) -> NDArray[np.float32]:
    """Returns log-sum-exp of log p / T, (r, t); with the exact entries it gives the tail mass at T."""
    columns = [
        _to_numpy((dense.shifted / temperature).logsumexp(dim=1) - dense.log_total / temperature)
        for temperature in temperatures
    ]
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(dense.total), 0), np.float32)


@dataclass(frozen=True)
class _Entries:
    """Stored entries of all rows, by row."""

    rows: NDArray[np.int64]  # (k,)
    ids: NDArray[np.int64]  # (k,)
    logprobs: NDArray[np.float32]  # (k,)

    @staticmethod
    def empty() -> _Entries:
        return _Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    @staticmethod
    def from_draws(draws: Draws, *, weight: float) -> _Entries:
        """Makes entries whose weight is the number of draws times the weight of one."""
        return _Entries(draws.rows, draws.ids, np.log(draws.counts * weight).astype(np.float32))

    def sort(self) -> _Entries:
        """Sorts each row by descending logprob, equal logprobs by ascending id."""
        # Floats of one sign sort as their bits.
        keys = (self.rows << 32) | np.abs(np.minimum(self.logprobs, 0)).view(np.uint32).astype(np.int64)
        order = np.argsort(keys)
        sorted_keys = keys.take(order)
        if (sorted_keys[1:] == sorted_keys[:-1]).any():
            order = np.lexsort((self.ids, keys))
        return _Entries(self.rows.take(order), self.ids.take(order), self.logprobs.take(order))


def _interleave(
    head: _Entries, sampled: _Entries, num_rows: int
) -> tuple[NDArray[np.int64], _Entries, NDArray[np.int32]]:
    """Returns CSR offsets, the entries with each row's exact ones first, and the number of exact ones."""
    num_exact = np.bincount(head.rows, minlength=num_rows)
    num_sampled = np.bincount(sampled.rows, minlength=num_rows)
    exact_before, sampled_before = np.cumsum(num_exact), np.cumsum(num_sampled)
    offsets = np.concatenate([np.zeros(1, np.int64), exact_before + sampled_before])
    size = len(head.rows) + len(sampled.rows)
    rows, ids, logprobs = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32)
    for entries, others_before in ((head, sampled_before - num_sampled), (sampled, exact_before)):
        at = np.arange(len(entries.rows)) + others_before.take(entries.rows)
        rows[at], ids[at], logprobs[at] = entries.rows, entries.ids, entries.logprobs
    return offsets.astype(np.int64), _Entries(rows, ids, logprobs), num_exact.astype(np.int32)


def _to_numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
