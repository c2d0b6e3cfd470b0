"""Preference losses: pairs of sequence logprobs in, a sum over pairs out.

Legend: p pairs. r_w and r_l are log pi_student(y) - log pi_teacher(y) of the chosen and of the rejected answer: sums
over response tokens in nats, no length normalisation, the teacher as the reference. All is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rewards:
    """Log-ratios of student to teacher, pair by pair."""

    chosen: Float[Tensor, " p"]
    rejected: Float[Tensor, " p"]

    @property
    def num_won(self) -> Float[Tensor, ""]:
        """How many pairs the student has in the right order, relative to the teacher."""
        return (self.chosen > self.rejected).sum()

    @property
    def margin(self) -> Float[Tensor, ""]:
        """Sum over pairs of r_w - r_l, in nats."""
        return (self.chosen - self.rejected).sum()


def dpo(rewards: Rewards, *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Sum over pairs of -log sigmoid(beta (r_w - r_l)); smoothing s gives the reverse order the share s of it.

    Sources: DPO (arXiv 2305.18290, eq. 7); conservative DPO (Mitchell, 2023).
    """
    logits = beta * (rewards.chosen - rewards.rejected)
    return -((1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)).sum()


def ipo(rewards: Rewards, *, beta: float) -> Float[Tensor, ""]:
    """Sum over pairs of (r_w - r_l - 1 / (2 beta))^2.

    Source: IPO (arXiv 2310.12036, eq. 17), with sums of logprobs as the paper has them.
    """
    return (rewards.chosen - rewards.rejected - 1 / (2 * beta)).square().sum()


def kto_pair(
    rewards: Rewards, *, beta: float, kl_chosen: Float[Tensor, " p"], kl_rejected: Float[Tensor, " p"]
) -> Float[Tensor, ""]:
    """Sum over pairs of the mean of 1 - sigmoid(beta (r_w - KL_l)) and 1 - sigmoid(beta (KL_w - r_l)).

    KL_x is the mean of r_x over a reference set, here given pair by pair and clamped at 0 from below: see
    `kl_estimates`. Source: LLaVA-MoD (arXiv 2408.15881), after KTO (arXiv 2402.01306).
    """
    chosen = 1 - (beta * (rewards.chosen - kl_rejected.clamp(min=0))).sigmoid()
    rejected = 1 - (beta * (kl_chosen.clamp(min=0) - rewards.rejected)).sigmoid()
    return (chosen + rejected).sum() / 2


KlReference = Literal["pair", "batch", "global"]


def kl_estimates(
    values: Float[Tensor, " p"], *, total: Float[Tensor, ""] | None = None, num_pairs: int | None = None
) -> Float[Tensor, " p"]:
    """The mean of some pairs' log-ratios, for each of them. The gradient flows through these pairs alone.

    `total` and `num_pairs`: sum (detached) and number over a larger set that these pairs are part of; without
    them the set is these pairs. The reference `pair` of the published scripts, which run batch 1, needs no
    mean: there each log-ratio is its own estimate.
    """
    if total is None or num_pairs is None:
        return values.mean().expand_as(values)
    return ((total + values.sum() - values.sum().detach()) / num_pairs).expand_as(values)
