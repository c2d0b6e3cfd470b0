"""Expert parallelism: the experts of each sparse layer are divided among ranks, and tokens travel to them.

DeepSpeed's AutoEP does it, beside ZeRO-1, 2 or 3: it puts its own layer in the place of each sparse one, which holds
this rank's experts and sends tokens to those of the others and back, two all-to-alls a layer. Nothing is dropped, so
the model is the same function. Here is what AutoEP has to know of a sparse LLaVA, and how its layers become standard
ones again.

Legend: e experts, d hidden, i width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError

_SPARSE_LAYERS = r".*\.language_model\.layers\.\d+\.mlp"
_ALIAS = ".mlp.gate.gate."  # of router.gate
_RENAMED = {
    ".mlp.router.gate.": ".mlp.gate.",
    ".mlp.shared_experts.": ".mlp.shared_expert.",
    ".mlp.shared_experts_gate.": ".mlp.shared_expert_gate.",
}


def check_ranks(num_ranks: int, size: int, *, stage: str) -> None:
    """ConfigError unless ranks can be divided into groups of `size`, each of which holds all experts."""
    if num_ranks % size:
        raise ConfigError(
            f"stages.{stage}.expert_parallel is {size}, which does not divide the {num_ranks} ranks of this run; "
            f"start a multiple of {size}, or set expert_parallel: 1"
        )


def check_experts(num_experts: int | None, size: int, *, student: str) -> None:
    """ConfigError unless a student's experts can be divided among `size` ranks. `num_experts`: None if it has none."""
    if num_experts is None:
        raise ConfigError(
            f"expert_parallel divides the experts of a sparse LLaVA, and {student} has none; give the stage `moe`, "
            "or leave it out"
        )
    if num_experts % size:
        raise ConfigError(f"expert_parallel is {size}, which does not divide the {num_experts} experts of {student}")


def autoep_settings(text_config: Any, size: int) -> dict[str, Any]:
    """DeepSpeed's section `expert_parallel` for a Qwen2-MoE decoder within a LLaVA."""
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": "qwen3_moe",  # which is Qwen2-MoE's too
        "moe_layer_pattern": _SPARSE_LAYERS,
        "top_k": text_config.num_experts_per_tok,
        "route_norm": text_config.norm_topk_prob,
        "has_shared_experts": text_config.shared_expert_intermediate_size > 0,
    }


def standard_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with AutoEP's layers, their experts whole, as transformers' Qwen2-MoE has them.

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
