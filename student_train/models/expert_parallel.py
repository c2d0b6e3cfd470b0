"""Expert parallelism: shards the experts of each sparse layer among ranks, which exchange tokens.

DeepSpeed's AutoEP does the work, with ZeRO-1, 2 or 3: it replaces each sparse layer by its own, which holds this
rank's experts and exchanges tokens with the other ranks by two all-to-alls. No token is dropped, so the model
computes the same function. This file configures AutoEP for a sparse LLaVA and converts its weights back to standard
names.

Legend: e experts, d hidden, i width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError

_SPARSE_LAYERS = r".*\.language_model\.layers\.\d+\.mlp"
_ALIAS = ".mlp.gate.gate."  # a second name of router.gate
_RENAMED = {
    ".mlp.router.gate.": ".mlp.gate.",
    ".mlp.shared_experts.": ".mlp.shared_expert.",
    ".mlp.shared_experts_gate.": ".mlp.shared_expert_gate.",
}


def check_ranks(num_ranks: int, size: int, *, stage: str) -> None:
    """Check that the ranks divide into groups of `size`, each of which holds all experts. Errors: ConfigError."""
    if num_ranks % size:
        raise ConfigError(
            f"stages.{stage}.expert_parallel is {size}, which does not divide the {num_ranks} ranks of this run; "
            f"start a multiple of {size}, or set expert_parallel: 1"
        )


def check_experts(num_experts: int | None, size: int, *, student: str) -> None:
    """Check that a student's experts divide among `size` ranks. `num_experts`: None for a dense student.

    Errors: ConfigError.
    """
    if num_experts is None:
        raise ConfigError(
            f"expert_parallel shards the experts of a sparse LLaVA, but {student} has none; give the stage `moe`, "
            "or remove expert_parallel"
        )
    if num_experts % size:
        raise ConfigError(
            f"expert_parallel is {size}, which does not divide the {num_experts} experts of {student}; "
            "set a divisor of their number"
        )


def make_autoep_settings(text_config: Any, size: int) -> dict[str, Any]:
    """Return DeepSpeed's section `expert_parallel` for a Qwen2-MoE decoder in a LLaVA."""
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": "qwen3_moe",  # fits Qwen2-MoE as well
        "moe_layer_pattern": _SPARSE_LAYERS,
        "top_k": text_config.num_experts_per_tok,
        "route_norm": text_config.norm_topk_prob,
        "has_shared_experts": text_config.shared_expert_intermediate_size > 0,
    }


def to_standard_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of AutoEP's layers, with whole experts, to those of transformers' Qwen2-MoE.

    `experts.w1` and `experts.w3`, both (e, i, d), become `experts.gate_up_proj` (e, 2 * i, d).
    """
    standard: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, leaf = name.rpartition(".experts.")
        if leaf == "w1":
            standard[f"{layer}.experts.gate_up_proj"] = torch.cat([tensor, weights[f"{layer}.experts.w3"]], dim=1)
        elif leaf == "w2":
            standard[f"{layer}.experts.down_proj"] = tensor
        elif leaf != "w3" and _ALIAS not in name:
            for theirs, ours in _RENAMED.items():
                name = name.replace(theirs, ours)
            standard[name] = tensor
    return standard
