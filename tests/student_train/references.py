"""Slow references of row losses: whole logits, one row after another, float64, gradients by autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from storage.records.sparse_rows import SparseRows
from student_train.losses.sparse_divergence import MIN_TAIL_MASS, PROFILE_FLOOR, LossSpec


def divergence(p: Tensor, q: Tensor, spec: LossSpec) -> Tensor:
    """Compute a divergence of two probability vectors by its definition; 0 log 0 is 0."""
    beta = {"jsd": 0.5, "skewed_kl": 0.1}.get(spec.divergence, 0.0) if spec.beta is None else spec.beta
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: _kl(p, q),
        "reverse_kl": lambda: _kl(q, p),
        "jsd": lambda: beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture),
        "skewed_kl": lambda: _kl(p, mixture),
        "total_variation": lambda: (p - q).abs().sum() / 2,
        "cross_entropy": lambda: -torch.xlogy(p, q).sum(),
    }[spec.divergence]()


def dense_loss(teacher_logits: np.ndarray, logits: Tensor, spec: LossSpec) -> Tensor:
    """Sum T^2 D(p_T, q_T) over rows, on the whole vocabulary."""
    p = (torch.tensor(teacher_logits, dtype=torch.float64) / spec.temperature).softmax(1)
    q = (logits.double() / spec.temperature).softmax(1)
    return spec.temperature**2 * sum((divergence(a, b, spec) for a, b in zip(p, q, strict=True)), logits.sum() * 0)


def sparse_loss(
    rows: SparseRows, log_sum_exp: np.ndarray, logits: Tensor, spec: LossSpec, profile: np.ndarray | None = None
) -> Tensor:
    """Sum the loss with tail handling over rows, with each row's events written out."""
    total = logits.sum().double() * 0
    for row in range(rows.num_rows):
        q = (logits[row].double() / spec.temperature).softmax(0)
        start, stop = int(rows.offsets[row]), int(rows.offsets[row + 1])
        if spec.treatment == "unbiased":
            weights = torch.tensor(np.exp(rows.logprobs[start:stop].astype(np.float64)))
            total = total - (weights * q[rows.ids[start:stop].astype(np.int64)].log()).sum()
            total = total - (float(rows.entropy[row]) if spec.divergence == "forward_kl" else 0)
            continue
        stop = start + int(rows.num_exact[row])
        ids = rows.ids[start:stop].astype(np.int64)
        p = np.exp(rows.logprobs[start:stop].astype(np.float64) / spec.temperature - log_sum_exp[row])
        if spec.temperature == 1:
            rest = float(rows.tail_mass[row])
        else:  # stored logprobs are float32, so the entries may sum to more than 1
            p = p / max(1.0, p.sum())
            rest = max(0.0, 1 - p.sum())
        others = np.setdiff1d(np.arange(len(q)), ids)
        if spec.treatment == "renormalise":
            p, rest = p / p.sum(), 0.0
        if spec.treatment == "truncate":
            total = total + spec.temperature**2 * divergence(torch.tensor(p), q[ids], spec)
            continue
        if spec.divergence == "reverse_kl":
            rest = max(rest, MIN_TAIL_MASS)
        if spec.treatment == "profile":
            assert profile is not None
            u = (1 - PROFILE_FLOOR) * profile / profile.sum() + PROFILE_FLOOR / len(profile)
            u = u ** (1 / spec.temperature)
            spread = rest * u[others] / u[others].sum() if len(others) else u[others]
            events = torch.tensor(np.concatenate([p, spread]))
            total = total + spec.temperature**2 * divergence(events, torch.cat([q[ids], q[others]]), spec)
            continue
        bucket = [torch.tensor([rest]), q[others].sum()[None]] if len(others) else [torch.zeros(0), q[:0]]
        events = torch.cat([torch.tensor(p), bucket[0].double()])
        total = total + spec.temperature**2 * divergence(events, torch.cat([q[ids], bucket[1]]), spec)
    return total


def _kl(a: Tensor, b: Tensor) -> Tensor:
    some = a > 0
    return (a[some] * (a[some].log() - b[some].log())).sum()
