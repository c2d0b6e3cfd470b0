"""Selections: dense logits to the sparse rows that a cache keeps.

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
from teacher_dump.signals.tail_sampling import RUN, Draws, independent_draws, run_sums, systematic_draws, tokens_of_runs

# Dense entries that are looked at together: on a CPU what its caches hold, on a GPU what keeps it busy.
_BLOCK_ENTRIES = {"cpu": 2**20, "gpu": 2**26}


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens of each row, exactly."""

    k: int


@dataclass(frozen=True)
class Threshold:
    """Every token with p >= tau exactly; any other with probability p / tau and weight tau."""

    tau: float


@dataclass(frozen=True)
class Mass:
    """The smallest set of most probable tokens whose mass is at least `mass`, exactly."""

    mass: float


@dataclass(frozen=True)
class Sampled:
    """`draws` independent draws from the row, each of weight 1 / draws; nothing exactly.

    Source: random-sampling knowledge distillation (arXiv 2503.16870), at proposal temperature 1.
    """

    draws: int


Selection = TopK | Threshold | Mass | Sampled


def row_uniforms(num_rows: int, *, seed: int, family: str, key: str, num_sets: int = 1) -> NDArray[np.float64]:
    """The random numbers of a sample's or an image's rows in [0, 1), (r, sets): a retry draws the same.

    Seeded by the selection's seed, the family, the sample id or image key and the set's number, and by nothing else.
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
    """Each row's stored entries, and its scalars over the full vocabulary, from float32 logits.

    `temperatures` besides 1 get a log-sum-exp. `uniforms` (r, sets), or (r,) of one set, in [0, 1) decide the draws of
    `Threshold` and `Sampled`: a set of them for each column. To `tail_total`, in float64, the probabilities
    outside the exact entries are added, row by row. ValueError: logits that are not finite.
    """
    num_rows, vocab_size = logits.shape
    uniforms = uniforms if uniforms.ndim == 2 else uniforms[:, None]
    most = max(1, _BLOCK_ENTRIES["cpu" if logits.device.type == "cpu" else "gpu"] // vocab_size)
    per_block = -(-num_rows // max(1, -(-num_rows // most))) or 1  # as even as can be
    blocks = []
    for start in range(0, max(num_rows, 1), per_block):
        block = slice(start, start + per_block)
        dense = _Dense.of(logits[block])
        own = None if labels is None else labels[block]
        blocks.append(_select(dense, own, selection, uniforms[block], temperatures, tail_total))
    return SparseRows.concatenate(blocks)


@dataclass(frozen=True, eq=False)
class _Dense:
    """Rows of logits with their largest taken off, and what every scalar is made of. p = weights / total."""

    shifted: Float[Tensor, "r v"]
    weights: Float[Tensor, "r v"]  # exp(shifted)
    sums: Float[Tensor, "r n"]  # of weights, by run
    total: Float[Tensor, " r"]
    log_total: Float[Tensor, " r"]  # log p = shifted - log_total

    @staticmethod
    def of(logits: Tensor) -> _Dense:
        shifted = logits - logits.amax(dim=1, keepdim=True)
        weights = shifted.exp()
        sums = run_sums(weights)
        total = sums.sum(dim=1)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("logits are not finite")
        return _Dense(shifted, weights, sums, total, total.log())

    def entropy(self) -> Tensor:
        """(r,) nats: the logarithm of the total less the mean of `shifted`."""
        products = self.shifted * self.weights
        sums = products.sum(dim=1)
        if not bool(torch.isfinite(sums).all()):  # a suppressed token: 0 times minus infinity
            sums = products.nansum(dim=1)
        return (self.log_total - sums / self.total).clamp_(min=0)

    def take_out(self, places: Tensor) -> None:
        """Weight 0 for some places in the flat rows; `shifted` and both totals stay as they were."""
        vocab_size = self.weights.shape[1]
        self.weights.view(-1)[places] = 0.0
        row, run = places // vocab_size, places % vocab_size // RUN
        self.sums[row, run] = tokens_of_runs(self.weights, row, run).sum(dim=1)


def _select(
    dense: _Dense,
    labels: Tensor | None,
    selection: Selection,
    uniforms: NDArray[np.float64],
    temperatures: Sequence[float],
    tail_total: Tensor | None,
) -> SparseRows:
    num_rows, vocab_size = dense.weights.shape
    label_logprob = None if labels is None else dense.shifted.gather(1, labels[:, None])[:, 0] - dense.log_total
    log_sum_exp = _tempered(dense, temperatures)
    places = _exact_places(dense, selection)  # (k,) in the flat rows
    logprobs = dense.shifted.view(-1)[places] - dense.log_total[places // vocab_size]
    head = _Entries(_numpy(places // vocab_size), _numpy(places % vocab_size), _numpy(logprobs)).falling()
    entropy = dense.entropy()
    dense.take_out(places)
    tail = dense.weights
    tail_mass = dense.sums.sum(dim=1) / dense.total  # summed itself: 1 - head would lose small tails
    if tail_total is not None:
        tail_total += tail.T @ dense.total.reciprocal()
    tail_norm = _numpy(torch.linalg.vector_norm(tail, dim=1) / dense.total).astype(np.float64)
    sets = []
    for column in uniforms.T:
        sampled = _drawn(dense, selection, column)
        offsets, entries, num_exact = _interleave(head, sampled, num_rows)
        rows = SparseRows(
            offsets=offsets,
            ids=entries.ids.astype(np.int32),
            logprobs=entries.logprobs.astype(np.float32),
            num_exact=num_exact,
            tail_mass=np.minimum(_numpy(tail_mass).astype(np.float32), np.float32(1)),
            entropy=_numpy(entropy).astype(np.float32),
            log_sum_exp=log_sum_exp,
            label_logprob=None if label_logprob is None else _numpy(label_logprob).astype(np.float32),
            selection_error=_distance(tail, dense.total, tail_norm, sampled),
        )
        sets.append(rows)
    return replace(sets[0], other_sets=tuple(sets[1:]))


def _drawn(dense: _Dense, selection: Selection, uniforms: NDArray[np.float64]) -> _Entries:
    """One set of draws from what is left of the rows; none of a selection that does not draw."""
    if isinstance(selection, Threshold):
        unit = selection.tau * dense.total
        drawn = systematic_draws(dense.weights, unit=unit, uniforms=uniforms, sums=dense.sums)
        return _Entries.drawn(drawn, weight=selection.tau)
    if isinstance(selection, Sampled):
        drawn = independent_draws(dense.weights, num_draws=selection.draws, uniforms=uniforms)
        return _Entries.drawn(drawn, weight=1 / selection.draws)
    return _Entries.none()


def _distance(tail: Tensor, total: Tensor, tail_norm: NDArray[np.float64], sampled: _Entries) -> NDArray[np.float32]:
    """(r,) the Euclidean distance of each row's entries from the dense row; exact entries add nothing to it."""
    squares = tail_norm**2
    if len(sampled.ids):
        places = torch.from_numpy(sampled.rows * tail.shape[1] + sampled.ids).to(tail.device)
        missed = _numpy(tail.reshape(-1)[places]).astype(np.float64) / _numpy(total).astype(np.float64)[sampled.rows]
        change = (np.exp(sampled.logprobs.astype(np.float64)) - missed) ** 2 - missed**2
        squares = squares + np.bincount(sampled.rows, change, len(squares))
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def _exact_places(dense: _Dense, selection: Selection) -> Tensor:
    """Where in the flat rows the exactly stored entries are."""
    num_rows, vocab_size = dense.weights.shape
    first = torch.arange(num_rows, device=dense.weights.device)[:, None] * vocab_size
    if isinstance(selection, Threshold):
        least = selection.tau * dense.total
        row, run = (dense.sums >= least[:, None]).nonzero(as_tuple=True)  # no run weighs less than its tokens
        at, token = (tokens_of_runs(dense.weights, row, run) >= least[row, None]).nonzero(as_tuple=True)
        return row[at] * vocab_size + run[at] * RUN + token
    if isinstance(selection, Sampled):
        return first.new_zeros(0)
    if isinstance(selection, Mass):
        falling, order = dense.weights.sort(dim=1, descending=True, stable=True)
        before = falling.double().cumsum(dim=1) - falling
        wanted = (before < selection.mass * dense.total[:, None]) & (falling > 0)
        return (first + order)[wanted]
    ids = dense.shifted.topk(min(selection.k, vocab_size), dim=1).indices
    return (first + ids)[torch.isfinite(dense.shifted.gather(1, ids))]


def _tempered(dense: _Dense, temperatures: Sequence[float]) -> NDArray[np.float32]:
    """(r, t) log-sum-exp of log p / T: what the tail weighs at T follows from it and the exact entries."""
    columns = [
        _numpy((dense.shifted / temperature).logsumexp(dim=1) - dense.log_total / temperature)
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
    def none() -> _Entries:
        return _Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    @staticmethod
    def drawn(draws: Draws, *, weight: float) -> _Entries:
        """Entries whose weight is that of one draw times their number."""
        return _Entries(draws.rows, draws.ids, np.log(draws.counts * weight).astype(np.float32))

    def falling(self) -> _Entries:
        """Within each row by falling logprob, equal ones by ascending id."""
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
    """CSR offsets, the entries with each row's exact ones first, and how many those are."""
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


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
