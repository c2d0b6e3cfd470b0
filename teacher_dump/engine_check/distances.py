"""The distance between the engine's hidden states and the model's own, through the output head. Pure functions.

Legend: r rows, d hidden, v vocabulary, n visual rows of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from storage.layout.documents import LARGEST_ERROR
from teacher_dump.signals.lm_head import OutputHead

_ROWS_AT_ONCE = 64  # of logprobs over the whole vocabulary, in float64


@dataclass(frozen=True, eq=False)
class RowDistances:
    """The distances of rows, float64. A row whose states are not finite in the engine has the largest ones."""

    kl: NDArray[np.float64]  # (r,) KL(model || engine) over the vocabulary, nats
    total_variation: NDArray[np.float64]  # (r,)
    label_logprob: NDArray[np.float64] | None  # (r,) absolute error in nats; None without labels


def compute_row_distances(
    head: OutputHead, model: Float[Tensor, "r d"], engine: Float[Tensor, "r d"], labels: Int[Tensor, " r"] | None
) -> RowDistances:
    """Computes the distances of rows over the dense vocabulary. `model` must be finite."""
    parts = [
        _compute_block(head, model[rows], engine[rows], None if labels is None else labels[rows])
        for start in range(0, len(model), _ROWS_AT_ONCE)
        for rows in [slice(start, start + _ROWS_AT_ONCE)]
    ]
    none = np.zeros(0)
    return RowDistances(
        kl=np.concatenate([none, *(part.kl for part in parts)]),
        total_variation=np.concatenate([none, *(part.total_variation for part in parts)]),
        label_logprob=None
        if labels is None
        else np.concatenate([none, *(part.label_logprob for part in parts if part.label_logprob is not None)]),
    )


def _compute_block(head: OutputHead, model: Tensor, engine: Tensor, labels: Tensor | None) -> RowDistances:
    is_finite = torch.isfinite(engine).all(dim=1)
    log_p, log_q = (head.logits(states).double().log_softmax(dim=1) for states in (model, engine.nan_to_num()))
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    error = None
    if labels is not None:
        places = labels[:, None].to(log_p.device)
        error = (log_p.gather(1, places) - log_q.gather(1, places))[:, 0].abs()
    broken = ~is_finite.to(log_p.device)
    return RowDistances(
        _bound(terms.sum(dim=1), broken, LARGEST_ERROR),
        _bound((p - q).abs().sum(dim=1) / 2, broken, 1.0),
        None if error is None else _bound(error, broken, LARGEST_ERROR),
    )


def _bound(values: Tensor, broken: Tensor, largest: float) -> NDArray[np.float64]:
    """Returns values between 0 and `largest`; `largest` in broken rows, and where a value is not a number."""
    bounded = values.masked_fill(broken, largest).nan_to_num(nan=largest, posinf=largest).clamp(0.0, largest)
    return bounded.cpu().numpy()


def compute_relation_error(
    head: OutputHead, model: Float[Tensor, "n d"], engine: Float[Tensor, "n d"], *, centered: bool
) -> float:
    """Computes 1 - cosine between the relation matrices of one image; 1 if the engine's states are not finite."""
    if not bool(torch.isfinite(engine).all()):
        return 1.0
    one, other = (head.relation(states, centered=centered).values.astype(np.float64) for states in (model, engine))
    return float(min(np.square(one - other).sum() / 2, 2.0))  # of matrices of norm 1


def find_other_widths(model: Sequence[Tensor], engine: Sequence[Tensor]) -> str:
    """Describes the first pair of states whose shapes differ; "" if none do."""
    for ours, theirs in zip(model, engine, strict=True):
        if ours.shape != theirs.shape:
            return f"the engine gives states of the shape {list(theirs.shape)}, the model {list(ours.shape)}"
    return ""
