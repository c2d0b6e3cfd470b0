"""Draws random tokens from the tails of distributions, in one pass over dense rows.

Legend: r rows, v vocabulary, k drawn entries of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

RUN = 64  # tokens whose weights are summed first, so that few runs need a search by token


@dataclass(frozen=True, eq=False)
class Draws:
    """The drawn tokens, sorted by row and id, and how often each was drawn."""

    rows: NDArray[np.int64]  # (k,)
    ids: NDArray[np.int64]  # (k,)
    counts: NDArray[np.int64]  # (k,) 1 or more

    @staticmethod
    def from_ids(rows: Tensor, ids: Tensor, *, vocab_size: int) -> Draws:
        """Counts single draws, given in any order."""
        keys = (rows * vocab_size + ids).cpu().numpy()
        if not (keys[1:] > keys[:-1]).all():  # some are drawn twice, or not in order
            keys, counts = np.unique(keys, return_counts=True)
            return Draws(keys // vocab_size, keys % vocab_size, counts)
        return Draws(rows.cpu().numpy(), ids.cpu().numpy(), np.ones(len(keys), np.int64))


def draw_systematically(
    weights: Float[Tensor, "r v"],
    *,
    unit: Float[Tensor, " r"],
    uniforms: NDArray[np.float64],
    sums: Float[Tensor, "r n"] | None = None,
) -> Draws:
    """Draws tokens at every multiple of a row's `unit` of weight, shifted by its uniform number in [0, 1).

    Token i is drawn once for each integer m with c[i-1] <= (u + m) unit < c[i], c the cumulative weights: on
    average weights[i] / unit times. A row gets its weight / unit draws, rounded up or down. A token of weight 0 is
    never drawn. Sums are in float64: in float32 the small steps of a large vocabulary round to 0.
    `sums`: sum_runs(weights), if known.
    """
    num_rows, vocab_size = weights.shape
    sums = (sum_runs(weights) if sums is None else sums).cumsum(dim=1, dtype=torch.float64)  # (r, runs)
    step = unit.double()[:, None]
    shift = torch.from_numpy(uniforms).to(weights.device)[:, None]
    counts = (sums[:, -1:] / step - shift).ceil().clamp(min=0)  # integers m with (u + m) unit < the row's weight
    number = torch.arange(int(counts.max()) if num_rows else 0, device=weights.device)
    points = (shift + number) * step  # (r, m) of which a row's first `counts` are draws
    run = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)
    row, place = (number < counts).nonzero(as_tuple=True)
    run, point = run[row, place], points[row, place]
    before = torch.where(run > 0, sums[row, (run - 1).clamp(min=0)], 0.0)
    within = gather_run_weights(weights, row, run).double().cumsum(dim=1)
    # Two ways of summing may differ in the last digit; a draw stays inside its run, on a token with weight.
    inside = torch.minimum((point - before).clamp(min=0), torch.nextafter(within[:, -1], within.new_zeros(())))
    ids = run * RUN + torch.searchsorted(within, inside[:, None], right=True)[:, 0]
    return Draws.from_ids(row, ids, vocab_size=vocab_size)


def draw_independently(weights: Float[Tensor, "r v"], *, num_draws: int, uniforms: NDArray[np.float64]) -> Draws:
    """Draws `num_draws` tokens with replacement from each row; its uniform number seeds the generator.

    Source: random-sampling knowledge distillation (arXiv 2503.16870), at proposal temperature 1.
    """
    num_rows, vocab_size = weights.shape
    seeds = (uniforms * 2.0**53).astype(np.uint64)
    points = [np.random.Generator(np.random.PCG64(int(seed))).random(num_draws) for seed in seeds]
    sums = weights.double().cumsum(dim=1)
    wanted = torch.from_numpy(np.array(points).reshape(num_rows, num_draws)).to(weights.device) * sums[:, -1:]
    ids = torch.searchsorted(sums, wanted, right=True).clamp_(max=vocab_size - 1)
    rows = torch.arange(num_rows, device=weights.device)[:, None].expand_as(ids)
    return Draws.from_ids(rows.reshape(-1), ids.reshape(-1), vocab_size=vocab_size)


def sum_runs(weights: Float[Tensor, "r v"]) -> Float[Tensor, "r n"]:
    """Sums weights over runs of RUN tokens; the last run may be shorter. No sum is below one of its weights."""
    num_rows, vocab_size = weights.shape
    whole = vocab_size // RUN * RUN
    sums = weights[:, :whole].reshape(num_rows, whole // RUN, RUN).sum(dim=2)
    rest = weights[:, whole:].sum(dim=1, keepdim=True)
    return torch.cat([sums, rest], dim=1) if whole < vocab_size else sums


def gather_run_weights(
    weights: Float[Tensor, "r v"], row: Int[Tensor, " k"], run: Int[Tensor, " k"]
) -> Float[Tensor, "k m"]:
    """Returns the weights of the runs' RUN tokens, 0 beyond the vocabulary."""
    vocab_size = weights.shape[1]
    if vocab_size < RUN or not len(run):
        return torch.nn.functional.pad(weights[row], (0, RUN - vocab_size))[: len(run), :RUN]
    flat = weights.reshape(-1)
    starts = (row * vocab_size + run * RUN).clamp(max=len(flat) - RUN)
    found = flat.unfold(0, RUN, 1).index_select(0, starts)  # many times faster than indexing token by token
    num_rest = vocab_size % RUN
    if num_rest:
        is_rest = run == vocab_size // RUN
        found[is_rest] = torch.nn.functional.pad(weights[row[is_rest], -num_rest:], (0, RUN - num_rest))
    return found
