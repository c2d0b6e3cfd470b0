"""Divergences as sums over events: the value of each event, and its slope in log q.

A divergence of a teacher p and a student q is a sum of f(p_j, q_j) over events j. Events are the tokens of the
vocabulary, or some of them and one event "any other token". With slopes a_j = df/d(log q_j), the gradient
with respect to the logits is a_j - q_j * sum(a). All functions take logarithms, either of which may be minus
infinity, and return (value, slope) of the same shape. D(p, p) is 0, except for the cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from student_train.losses.config import Divergence

EventLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LINEAR: Final = ("forward_kl", "cross_entropy")  # linear in p, up to the teacher's own entropy
WEIGHTED_BY_TEACHER: Final = (*LINEAR, "skewed_kl")  # events without teacher mass contribute 0
DEFAULT_BETA: Final = {"jsd": 0.5, "skewed_kl": 0.1}


def select_event_loss(divergence: Divergence, beta: float | None = None) -> EventLoss:
    """Return the function f of a divergence. `beta`: the teacher's share of the mixture (jsd, skewed_kl)."""
    if divergence in DEFAULT_BETA:
        share = DEFAULT_BETA[divergence] if beta is None else beta
        return partial({"jsd": _jensen_shannon, "skewed_kl": _skewed_kl}[divergence], beta=share)
    return {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "total_variation": _total_variation,
        "cross_entropy": _cross_entropy,
    }[divergence]


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(p || q): p (log p - log q)."""
    p = log_p.exp()
    return _multiply_or_zero(p, log_p - log_q), -p


def _cross_entropy(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute -p log q, which is forward KL plus the teacher's entropy."""
    p = log_p.exp()
    return _multiply_or_zero(p, -log_q), -p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(q || p): q (log q - log p)."""
    q = log_q.exp()
    value = _multiply_or_zero(q, log_q - log_p)
    return value, value + q


def _jensen_shannon(log_p: Tensor, log_q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Source: generalised JSD of GKD (arXiv 2306.13649), equation 1.
    """
    p, q, log_m = log_p.exp(), log_q.exp(), _compute_log_mixture(log_p, log_q, beta)
    slope = (1 - beta) * _multiply_or_zero(q, log_q - log_m)
    return beta * _multiply_or_zero(p, log_p - log_m) + slope, slope


def _skewed_kl(log_p: Tensor, log_q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(p || beta p + (1 - beta) q), which is finite where the student has no mass.

    Source: DistiLLM (arXiv 2402.03898), equation 4, its alpha.
    """
    p, log_m = log_p.exp(), _compute_log_mixture(log_p, log_q, beta)
    return _multiply_or_zero(p, log_p - log_m), -_multiply_or_zero(p, (math.log1p(-beta) + log_q - log_m).exp())


def _total_variation(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute |p - q| / 2."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs() / 2, q * difference.sign() / 2


def _compute_log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _multiply_or_zero(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value, and 0 where the weight is 0 even if the value is infinite; NaN weights stay NaN."""
    return torch.where(weight == 0, 0, weight * value)
