"""Preference losses of pairs of sequence logprobs, summed over pairs.

Legend: p pairs. r_w and r_l are log pi_student(y) - log pi_teacher(y) of the chosen and of the rejected answer: sums
over response tokens in nats, not normalised by length, with the teacher as the reference. Computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from student_train.losses.config import PreferenceLossSection


@dataclass(frozen=True, eq=False)
class Rewards:
    """Log-ratios of student to teacher, pair by pair."""

    chosen: Float[Tensor, " p"]
    rejected: Float[Tensor, " p"]

    @property
    def num_won(self) -> Int[Tensor, ""]:
        """Number of pairs that the student, relative to the teacher, orders correctly."""
        return (self.chosen > self.rejected).sum()

    @property
    def margin(self) -> Float[Tensor, ""]:
        """Sum over pairs of r_w - r_l, in nats."""
        return (self.chosen - self.rejected).sum()


def dpo(rewards: Rewards, *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Sum -log sigmoid(beta (r_w - r_l)) over pairs; smoothing s gives the reverse order the weight s.

    Sources: DPO (arXiv 2305.18290, eq. 7); conservative DPO (Mitchell, 2023).
    """
    logits = beta * (rewards.chosen - rewards.rejected)
    return -((1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)).sum()


def ipo(rewards: Rewards, *, beta: float) -> Float[Tensor, ""]:
    """Sum (r_w - r_l - 1 / (2 beta))^2 over pairs.

    Source: IPO (arXiv 2310.12036, eq. 17), with sums of logprobs as in the paper.
    """
    return (rewards.chosen - rewards.rejected - 1 / (2 * beta)).square().sum()


def kto_pair(
    rewards: Rewards, *, beta: float, kl_chosen: Float[Tensor, " p"], kl_rejected: Float[Tensor, " p"]
) -> Float[Tensor, ""]:
    """Sum the mean of 1 - sigmoid(beta (r_w - KL_l)) and 1 - sigmoid(beta (KL_w - r_l)) over pairs.

    KL_x is the mean of r_x over a reference set, given for each pair (see `expand_mean`) and clamped to at least 0.
    Source: LLaVA-MoD (arXiv 2408.15881), after KTO (arXiv 2402.01306).
    """
    chosen = 1 - (beta * (rewards.chosen - kl_rejected.clamp(min=0))).sigmoid()
    rejected = 1 - (beta * (kl_chosen.clamp(min=0) - rewards.rejected)).sigmoid()
    return (chosen + rejected).sum() / 2


def preference_loss(rewards: Rewards, section: PreferenceLossSection) -> Float[Tensor, ""]:
    """Compute the configured loss, summed over pairs. With `kl_reference: global` it is a collective."""
    if section.kind == "dpo":
        return dpo(rewards, beta=section.beta, label_smoothing=section.label_smoothing)
    if section.kind == "ipo":
        return ipo(rewards, beta=section.beta)
    kl_chosen, kl_rejected = rewards.chosen, rewards.rejected
    if section.kl_reference != "pair":
        everywhere = section.kl_reference == "global"
        kl_chosen, kl_rejected = (expand_mean(values, over_ranks=everywhere) for values in (kl_chosen, kl_rejected))
    return kto_pair(rewards, beta=section.beta, kl_chosen=kl_chosen, kl_rejected=kl_rejected)


def expand_mean(values: Float[Tensor, " p"], *, over_ranks: bool = False) -> Float[Tensor, " p"]:
    """Return the mean of the pairs' log-ratios, repeated for each pair; empty for no pairs.

    With `over_ranks` this is a collective and the mean is over the pairs of all ranks; the gradient flows through
    this rank's pairs only.
    """
    sums = torch.stack([values.sum().detach(), values.new_tensor(float(len(values)))])
    if over_ranks and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    mean = (sums[0] + values.sum() - values.sum().detach()) / sums[1].clamp(min=1)
    return mean.expand_as(values)
