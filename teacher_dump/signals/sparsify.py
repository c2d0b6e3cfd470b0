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
) -> SparseRows:
    """Selects each row's stored entries, and computes its scalars over the full vocabulary: see `select_blocks`."""
    settings = {"selection": selection, "uniforms": uniforms, "temperatures": temperatures}
    return join_blocks(select_blocks(logits, labels=labels, **settings).blocks)


def select_blocks(
    logits: Float[Tensor, "r v"],
    *,
    labels: Int[Tensor, " r"] | None,
    selection: Selection,
    uniforms: NDArray[np.float64],
    temperatures: Sequence[float] = (),
    sums_tails: bool = False,
) -> SelectedBlocks:
    """Selects from float32 logits, a block of rows at a time.

    Each of `temperatures` gets a log-sum-exp. `uniforms` (r, sets), or (r,) for one set, in [0, 1) decide the draws
    of `Threshold` and `Sampled`, one set of draws for each column. Raises ValueError for logits that are not finite.
    """
    num_rows, vocab_size = logits.shape
    uniforms = uniforms if uniforms.ndim == 2 else uniforms[:, None]
    most = max(1, _BLOCK_ENTRIES["cpu" if logits.device.type == "cpu" else "gpu"] // vocab_size)
    per_block = -(-num_rows // max(1, -(-num_rows // most))) or 1  # blocks of nearly equal size
    blocks: list[_SelectedBlock] = []
    tail_sum = logits.new_zeros(vocab_size, dtype=torch.float64) if sums_tails else None
    for start in range(0, max(num_rows, 1), per_block):
        block = slice(start, start + per_block)
        dense = _DenseRows.from_logits(logits[block])
        own = None if labels is None else labels[block]
        blocks.append(_select(dense, own, selection, uniforms[block], temperatures))
        if tail_sum is not None:
            tail_sum += dense.weights.T @ dense.total.reciprocal()  # without the exact entries
    return SelectedBlocks(blocks, tail_sum)


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """What was selected from some rows: at least one block, and the sum of the rows' tails if it was asked for."""

    blocks: list[_SelectedBlock]
    tail_sum: Float[Tensor, " v"] | None  # float64, the probabilities outside the exact entries


@dataclass(frozen=True, eq=False)
class _SelectedBlock:
    """The selected entries of some rows, wherever the selection left them, and the rows' scalars (see SparseRows)."""

    exact: _Entries
    sampled: tuple[_Entries, ...]  # by set of draws
    tail_mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    log_sum_exp: NDArray[np.float32]
    label_logprob: NDArray[np.float32] | None
    selection_errors: tuple[NDArray[np.float32], ...]  # by set of draws


def join_blocks(blocks: Sequence[_SelectedBlock]) -> SparseRows:
    """Joins the rows of one or more blocks; each entry is copied once, to its place in its row."""
    num_exact = np.concatenate([block.exact.count(len(block.tail_mass)) for block in blocks])
    labels = [block.label_logprob for block in blocks if block.label_logprob is not None]
    scalars = {
        "num_exact": num_exact.astype(np.int32),
        "tail_mass": np.concatenate([block.tail_mass for block in blocks]),
        "entropy": np.concatenate([block.entropy for block in blocks]),
        "log_sum_exp": np.concatenate([block.log_sum_exp for block in blocks]),
        "label_logprob": np.concatenate(labels) if labels else None,
    }
    sets = []
    for number in range(len(blocks[0].sampled)):
        num_sampled = np.concatenate([block.sampled[number].count(len(block.tail_mass)) for block in blocks])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_exact + num_sampled)])
        ids, logprobs = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
        first = 0
        for block in blocks:
            own = slice(first, first + len(block.tail_mass))
            starts = offsets[:-1][own]  # of each row: first its exact entries, then its sampled ones
            for entries, begins in ((block.exact, starts), (block.sampled[number], starts + num_exact[own])):
                at = begins.take(entries.rows) + entries.places
                ids[at], logprobs[at] = entries.ids, entries.logprobs
            first = own.stop
        errors = np.concatenate([block.selection_errors[number] for block in blocks])
        sets.append(SparseRows(offsets, ids, logprobs, **scalars, selection_error=errors))
    return replace(sets[0], other_sets=tuple(sets[1:]))


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
) -> _SelectedBlock:
    """Selects the entries of a block, and removes the exact ones from `dense`."""
    vocab_size = dense.weights.shape[1]
    label_logprob = None if labels is None else dense.shifted.gather(1, labels[:, None])[:, 0] - dense.log_total
    log_sum_exp = _compute_log_sum_exps(dense, temperatures)
    places = _find_exact_places(dense, selection)  # (k,) in the flat rows
    logprobs = dense.shifted.view(-1)[places] - dense.log_total[places // vocab_size]
    exact = _Entries.from_exact(*map(_to_numpy, (places // vocab_size, places % vocab_size, logprobs)))
    entropy = dense.entropy()
    dense.remove_entries(places)
    tail = dense.weights
    tail_mass = dense.sums.sum(dim=1) / dense.total  # summed itself: 1 - head would lose small tails
    tail_norm = _to_numpy(torch.linalg.vector_norm(tail, dim=1) / dense.total).astype(np.float64)
    sampled = tuple(_draw_entries(dense, selection, column) for column in uniforms.T)
    return _SelectedBlock(
        exact=exact,
        sampled=sampled,
        tail_mass=np.minimum(_to_numpy(tail_mass), np.float32(1)),
        entropy=_to_numpy(entropy),
        log_sum_exp=log_sum_exp,
        label_logprob=None if label_logprob is None else _to_numpy(label_logprob),
        selection_errors=tuple(_compute_distance(tail, dense.total, tail_norm, drawn) for drawn in sampled),
    )


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


@dataclass(frozen=True, eq=False)
class _Entries:
    """Exact or sampled entries of a block's rows, in any order within a row."""

    rows: NDArray[np.int64]  # (k,)
    places: NDArray[np.int32]  # (k,) among the entries of its row
    ids: NDArray[np.int64]  # (k,)
    logprobs: NDArray[np.float32]  # (k,)

    @staticmethod
    def empty() -> _Entries:
        none = np.zeros(0, np.int64)
        return _Entries(none, none.astype(np.int32), none, np.zeros(0, np.float32))

    @staticmethod
    def from_draws(draws: Draws, *, weight: float) -> _Entries:
        """Makes entries whose weight is the number of draws times the weight of one, by ascending id."""
        logprobs = np.log(draws.counts * weight).astype(np.float32)
        return _Entries(draws.rows, _number_in_rows(draws.rows), draws.ids, logprobs)

    @staticmethod
    def from_exact(rows: NDArray[np.int64], ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> _Entries:
        """Makes entries whose places are by descending logprob, of equal logprobs by ascending id."""
        # Floats of one sign sort as their bits.
        keys = (rows << 32) | np.abs(np.minimum(logprobs, 0)).view(np.uint32).astype(np.int64)
        order = np.argsort(keys)
        sorted_keys = keys.take(order)
        if (sorted_keys[1:] == sorted_keys[:-1]).any():
            order = np.lexsort((ids, keys))
        places = np.empty(len(order), np.int32)
        places[order] = _number_in_rows(rows.take(order))
        return _Entries(rows, places, ids, logprobs)

    def count(self, num_rows: int) -> NDArray[np.int64]:
        """Returns (r,) the number of entries of each row."""
        return np.bincount(self.rows, minlength=num_rows)


def _number_in_rows(rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Returns (k,) the number of each entry within its row, of entries that are sorted by row."""
    counts = np.bincount(rows)
    return np.arange(len(rows), dtype=np.int32) - (np.cumsum(counts) - counts).astype(np.int32).take(rows)


def _to_numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
