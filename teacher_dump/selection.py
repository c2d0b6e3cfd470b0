"""Selections: dense logits to the sparse rows that a cache keeps.

Legend: r rows, v vocabulary, k stored entries of all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from storage.rows import SparseRows

_ROWS_PER_DRAW = 64  # float64 [rows, v] at once: 78 MB for a vocabulary of 152k


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


def row_uniforms(num_rows: int, *, seed: int, family: str, key: str) -> NDArray[np.float64]:
    """The random numbers of a sample's or an image's rows, one a row in [0, 1): a retry draws the same.

    Seeded by the selection's seed, the family and the sample id or image key, and by nothing else.
    """
    digest = hashlib.sha256(f"stillhouse draws 1\0{seed}\0{family}\0{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).random(num_rows)


def select_rows(
    logits: Float[Tensor, "r v"],
    *,
    labels: Int[Tensor, " r"] | None,
    selection: Selection,
    uniforms: NDArray[np.float64],
    temperatures: Sequence[float] = (),
) -> SparseRows:
    """Each row's stored entries, and its scalars over the full vocabulary, from float32 logits.

    `temperatures` besides 1 get a log-sum-exp. `uniforms` (r,) in [0, 1) decide the draws of
    `Threshold` and `Sampled`. ValueError: logits that are not finite.
    """
    log_sum_exp = torch.logsumexp(logits, dim=-1)  # (r,)
    if not bool(torch.isfinite(log_sum_exp).all()):
        raise ValueError("logits are not finite")
    logprobs = logits - log_sum_exp[:, None]
    probs = logprobs.exp()
    entropy = torch.special.entr(probs).sum(dim=-1)
    label_logprob = None if labels is None else logprobs.gather(1, labels[:, None])[:, 0]
    exact = _exact_mask(logprobs, probs, selection)
    tail_mass = probs.masked_fill(exact, 0.0).sum(dim=-1)  # summed itself: 1 - head would lose small tails
    rows, ids = exact.nonzero(as_tuple=True)
    head = _Entries(_numpy(rows), _numpy(ids), _numpy(logprobs[rows, ids])).falling()
    sampled = _Entries.none()
    if isinstance(selection, Threshold):
        sampled = _draw(probs.masked_fill(exact, 0.0), tau=selection.tau, uniforms=uniforms)
    elif isinstance(selection, Sampled):
        sampled = _draw_independently(probs, draws=selection.draws, uniforms=uniforms)
    offsets, entries, num_exact = _interleave(head, sampled, logits.shape[0])
    return SparseRows(
        offsets=offsets,
        ids=entries.ids.astype(np.int32),
        logprobs=entries.logprobs.astype(np.float32),
        num_exact=num_exact,
        tail_mass=np.minimum(_numpy(tail_mass).astype(np.float32), np.float32(1)),
        entropy=_numpy(entropy).astype(np.float32),
        log_sum_exp=_tempered(logprobs, temperatures),
        label_logprob=None if label_logprob is None else _numpy(label_logprob).astype(np.float32),
    )


def _tempered(logprobs: Tensor, temperatures: Sequence[float]) -> NDArray[np.float32]:
    """(r, t) log-sum-exp of log p / T: what the tail weighs at T follows from it and the exact entries."""
    columns = [_numpy((logprobs / temperature).logsumexp(dim=-1)) for temperature in temperatures]
    shape = (logprobs.shape[0], len(columns))
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros(shape, np.float32)


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
    def joined(parts: Sequence[_Entries]) -> _Entries:
        """All of them, one after another."""
        if not parts:
            return _Entries.none()
        return _Entries(
            np.concatenate([entries.rows for entries in parts]),
            np.concatenate([entries.ids for entries in parts]),
            np.concatenate([entries.logprobs for entries in parts]),
        )

    def falling(self) -> _Entries:
        """Within each row by falling logprob, equal ones by ascending id."""
        order = np.lexsort((self.ids, -self.logprobs, self.rows))
        return _Entries(self.rows[order], self.ids[order], self.logprobs[order])


def _exact_mask(logprobs: Tensor, probs: Tensor, selection: Selection) -> Tensor:
    if isinstance(selection, Threshold):
        return probs >= selection.tau
    if isinstance(selection, Sampled):
        return torch.zeros_like(probs, dtype=torch.bool)
    if isinstance(selection, Mass):
        falling, order = probs.sort(dim=-1, descending=True, stable=True)
        before = falling.double().cumsum(dim=-1) - falling
        return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, before < selection.mass) & (probs > 0)
    ids = logprobs.topk(min(selection.k, logprobs.shape[1]), dim=-1).indices
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, ids, True) & torch.isfinite(logprobs)


def _draw(tail: Tensor, *, tau: float, uniforms: NDArray[np.float64]) -> _Entries:
    """Systematic draws: token i gets one for each whole number m with c[i-1] <= u + m < c[i], c = cumsum(p) / tau.

    So the number of draws of a row is its tail / tau, rounded up or down, and the draws' weight is
    within tau of the tail. In float64: summed in float32, the small steps of a large vocabulary round to none.
    """
    found: list[_Entries] = []
    for start in range(0, tail.shape[0], _ROWS_PER_DRAW):
        steps = tail[start : start + _ROWS_PER_DRAW].double().cumsum(dim=-1) / tau
        shift = torch.from_numpy(uniforms[start : start + _ROWS_PER_DRAW]).to(steps.device)
        below = (steps - shift[:, None]).ceil_().clamp_(min=0)  # whole numbers m with u + m < c[i]
        counts = below.diff(dim=-1, prepend=below.new_zeros(below.shape[0], 1))
        rows, ids = counts.nonzero(as_tuple=True)
        weights = (counts[rows, ids] * tau).log()
        found.append(_Entries(_numpy(rows) + start, _numpy(ids), _numpy(weights).astype(np.float32)))
    return _Entries.joined(found)


def _draw_independently(probs: Tensor, *, draws: int, uniforms: NDArray[np.float64]) -> _Entries:
    """Draws with replacement. A row's own uniform seeds its generator, so that a retry draws the same."""
    found: list[_Entries] = []
    for start in range(0, probs.shape[0], _ROWS_PER_DRAW):
        mass = probs[start : start + _ROWS_PER_DRAW].double().cumsum(dim=-1)
        seeds = (uniforms[start : start + _ROWS_PER_DRAW] * 2.0**53).astype(np.uint64)
        points = np.stack([np.random.Generator(np.random.PCG64(int(seed))).random(draws) for seed in seeds])
        drawn = torch.searchsorted(mass, torch.from_numpy(points).to(mass.device) * mass[:, -1:], right=True)
        drawn = _numpy(drawn.clamp_(max=probs.shape[1] - 1))
        keys, counts = np.unique(np.arange(len(drawn))[:, None] * probs.shape[1] + drawn, return_counts=True)
        weights = np.log(counts / draws).astype(np.float32)
        found.append(_Entries(keys // probs.shape[1] + start, keys % probs.shape[1], weights))
    return _Entries.joined(found)


def _interleave(
    head: _Entries, sampled: _Entries, num_rows: int
) -> tuple[NDArray[np.int64], _Entries, NDArray[np.int32]]:
    """CSR offsets, the entries with each row's exact ones first, and how many those are."""
    num_exact = np.bincount(head.rows, minlength=num_rows)
    counts = num_exact + np.bincount(sampled.rows, minlength=num_rows)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    rows = np.concatenate([head.rows, sampled.rows])
    order = np.argsort(rows, kind="stable")
    entries = _Entries(
        rows[order],
        np.concatenate([head.ids, sampled.ids])[order],
        np.concatenate([head.logprobs, sampled.logprobs])[order],
    )
    return offsets.astype(np.int64), entries, num_exact.astype(np.int32)


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
