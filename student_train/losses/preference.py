"""Preference losses: pairs of sequence logprobs in, a sum over pairs out.

Legend: p pairs. r_w and r_l are log pi_student(y) - log pi_teacher(y) of the chosen and of the rejected answer: sums
over response tokens in nats, no length normalisation, the teacher as the reference. All is computed in float32.
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
    `mean_of`. Source: LLaVA-MoD (arXiv 2408.15881), after KTO (arXiv 2402.01306).
    """
    chosen = 1 - (beta * (rewards.chosen - kl_rejected.clamp(min=0))).sigmoid()
    rejected = 1 - (beta * (kl_chosen.clamp(min=0) - rewards.rejected)).sigmoid()
    return (chosen + rejected).sum() / 2


def preference_loss(rewards: Rewards, section: PreferenceLossSection) -> Float[Tensor, ""]:
    """The configured loss, summed over pairs. With `kl_reference: global` a collective of all ranks."""
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
    """The mean of some pairs' log-ratios, for each of them; of no pairs, none.

    With `over_ranks` the mean is that of all ranks' pairs, and a collective; the gradient still flows through
    these pairs alone.
    """
    sums = torch.stack([values.sum().detach(), values.new_tensor(float(len(values)))])
    if over_ranks and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    mean = (sums[0] + values.sum() - values.sum().detach()) / sums[1].clamp(min=1)
    return mean.expand_as(values)
