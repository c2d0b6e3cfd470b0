"""Losses and statistics of routers: load balance, z-loss, entropy, each expert's share of the tokens.

Legend: l sparse layers, t tokens, e experts, k experts that process a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RouterLosses:
    """Router losses of one micro-batch without its padding: summed over layers; entropy averaged over them."""

    balance: Float[Tensor, ""]  # sum over layers of e * sum_i f_i * P_i; 1 a layer if balanced
    z: Float[Tensor, ""]  # sum over layers of the mean squared log-sum-exp of the router's logits
    load: Float[Tensor, "l e"]  # f: the share of the token-expert assignments that each expert gets; detached
    entropy: Float[Tensor, ""]  # nats, of a token's routing distribution; detached


def router_losses(
    logits: Sequence[Float[Tensor, "t e"]], is_token: Bool[Tensor, " t"], *, top_k: int, first_choice: bool = False
) -> RouterLosses:
    """Compute load balance and z-loss of the routers' logits, in float32. `is_token`: False for padding.

    f_i is the share of assignments that expert i gets, over all k choices, and carries no gradient; P_i is its mean
    routing probability. With `first_choice` the balance takes for f_i the share of tokens whose first choice is i.
    Without tokens the losses are 0 and stay attached to the graph.

    Sources: Switch Transformer (arXiv 2101.03961, eq. 4-6), as used by LLaVA-MoD; `first_choice` follows its code,
    DeepSpeed's top2gating (sharded_moe.py); ST-MoE (arXiv 2202.08906, eq. 5).
    """
    weight = is_token.to(logits[0].device, torch.float32)[:, None]  # (t, 1)
    num_tokens = weight.sum().clamp(min=1)
    balance = z = entropy = logits[0].new_zeros((), dtype=torch.float32)
    loads = []
    for layer in logits:
        logprobs = layer.float().log_softmax(1)
        probs = logprobs.exp()
        choices = layer.topk(top_k, dim=1).indices
        load = _compute_load(choices, weight, probs)
        balanced = _compute_load(choices[:, :1], weight, probs) if first_choice else load
        balance = balance + probs.shape[1] * (balanced * ((probs * weight).sum(0) / num_tokens)).sum()
        z = z + (layer.float().logsumexp(1).square() * weight[:, 0]).sum() / num_tokens
        entropy = entropy - (probs * logprobs * weight).sum().detach() / num_tokens
        loads.append(load)
    return RouterLosses(balance, z, torch.stack(loads), entropy / len(logits))


def _compute_load(choices: Int[Tensor, "t k"], weight: Float[Tensor, "t 1"], like: Tensor) -> Float[Tensor, " e"]:
    """Return each expert's share of the choices of the weighted tokens."""
    chosen = torch.zeros_like(like).scatter_(1, choices, 1.0)
    return (chosen * weight).sum(0) / (weight.sum().clamp(min=1) * choices.shape[1])


def summarize_routers(batches: Sequence[tuple[int, RouterLosses]]) -> dict[str, Any]:
    """Average router losses over batches of (number of tokens, losses); one or more batches.

    `load` is listed by layer and expert. `balance` is 1 for an even load, and the number of experts over k if all
    tokens go to the same ones. `dropped` is 0: experts have no capacity limit.
    """
    num_tokens = sum(count for count, _ in batches)
    shares = [(count / max(1, num_tokens), losses) for count, losses in batches]
    load = sum((share * losses.load.double() for share, losses in shares), torch.zeros(()))
    return {
        "num_tokens": num_tokens,
        "load": load.tolist(),
        "entropy": sum(share * float(losses.entropy) for share, losses in shares),
        "balance": sum(share * float(losses.balance) for share, losses in shares) / len(load),
        "z": sum(share * float(losses.z) for share, losses in shares) / len(load),
        "dropped": 0,
    }
