"""Sparse upcycling: turns a dense decoder into a mixture of experts, copies of its MLPs behind new routers.

The result is a standard architecture, Qwen2-MoE without a shared expert, so transformers, vLLM and evaluation
harnesses load it without our code. A token's k routing weights sum to 1 and equal experts give equal outputs, so
before training the sparse model computes the same function as the dense one, up to rounding, for any routers.

Sources: Sparse Upcycling (arXiv 2212.05055); LLaVA-MoD (arXiv 2408.15881), where every second layer becomes
four experts, two of them active.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError
from student_train.models.huggingface import import_transformers, is_empty_expert

SPARSE_TYPE = "qwen2_moe"
_ARCHITECTURE = "Qwen2MoeForCausalLM"
_DENSE_TYPES = {"qwen2": True, "llama": False, "mistral": False}  # and whether their q, k, v have a bias
_REFUSED = (  # fields that Qwen2-MoE cannot express, with their neutral values
    ("mlp_bias", False),
    ("attention_bias", False),
    ("use_sliding_window", False),
    ("pretraining_tp", 1),
)


@dataclass(frozen=True)
class ExpertSettings:
    """The number of experts of a sparse layer, of experts a token, and which layers are sparse."""

    num_experts: int
    top_k: int
    every: int  # layers 0, every, 2 * every, … as `layers[::every]`


def upcycle(model: Any, experts: ExpertSettings, *, seed: int) -> Any:
    """Return a LLaVA with a sparse decoder made from a dense one; all weights but the MLPs are copied unchanged.

    Routers are drawn from N(0, initializer_range) by `seed`.
    Errors: ConfigError for a decoder without a matching standard sparse architecture.
    """
    config = copy.deepcopy(model.config)
    config.text_config = make_sparse_config(model.config.text_config, experts)
    dense = model.state_dict()
    like = model.get_input_embeddings().weight
    with warnings.catch_warnings(), like.device:
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # the shared expert of no width
        sparse = import_transformers().AutoModelForImageTextToText.from_config(config, dtype=like.dtype)
    generator = torch.Generator().manual_seed(seed)
    sparse.load_state_dict(
        {
            name: dense[name] if name in dense else _make_tensor(name, tensor, dense, config.text_config, generator)
            for name, tensor in sparse.state_dict().items()
        }
    )
    sparse.generation_config = model.generation_config
    return sparse.eval()


def make_sparse_config(text_config: Any, experts: ExpertSettings) -> Any:
    """Return the configuration of the sparse decoder made from a dense one. ConfigError if it cannot express it."""
    kind = text_config.model_type
    if kind == SPARSE_TYPE:
        raise ConfigError(
            "moe: the student is already a mixture of experts; remove `moe`, or start from a dense student"
        )
    if kind not in _DENSE_TYPES:
        raise ConfigError(
            f"moe: the student's decoder is a {kind!r}; expected one of {', '.join(sorted(_DENSE_TYPES))}, "
            "which have a standard sparse architecture; remove `moe`, or start from one of them"
        )
    for field, harmless in _REFUSED:
        value = getattr(text_config, field, harmless)
        if value not in (harmless, None):
            raise ConfigError(
                f"moe: the student's decoder has {field} = {value!r}, which {SPARSE_TYPE} cannot express; remove `moe`"
            )
    head_dim = getattr(text_config, "head_dim", None)
    if head_dim not in (None, text_config.hidden_size // text_config.num_attention_heads):
        raise ConfigError(
            f"moe: the student's head_dim is {head_dim}, but {SPARSE_TYPE} needs hidden_size / num_attention_heads; "
            "remove `moe`"
        )
    if not 1 <= experts.top_k <= experts.num_experts:
        raise ConfigError(f"moe: top_k is {experts.top_k}, expected 1 to {experts.num_experts}, the number of experts")
    num_layers = text_config.num_hidden_layers
    sparse = range(0, num_layers, experts.every)
    shared = {
        name: getattr(text_config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
            "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id",
            "eos_token_id", "dtype",
        )
    }  # fmt: skip
    return import_transformers().Qwen2MoeConfig(
        **shared,
        qkv_bias=_DENSE_TYPES[kind],
        num_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        norm_topk_prob=True,  # the routing weights of a token sum to 1
        moe_intermediate_size=text_config.intermediate_size,
        shared_expert_intermediate_size=0,
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(num_layers) if layer not in sparse],
        architectures=[_ARCHITECTURE],  # vLLM finds the decoder in a LLaVA by it
    )


def route_in_float32(model: Any) -> None:
    """Make the routers of a sparse LLaVA compute their logits and choices in float32, whatever the model's dtype.

    In bfloat16 the logits of two experts that differ by less than one part in 256 are equal, and the lower number is
    chosen. Weights, their names and the checkpoint do not change.
    Source: DeepSpeed's TopKGate, which LLaVA-MoD's published code runs, keeps its router in float32.
    """
    for layer in model.model.language_model.layers:
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            layer.mlp.gate.forward = types.MethodType(_route_in_float32, layer.mlp.gate)


def _route_in_float32(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (t, e), and weights and numbers of the chosen experts (t, k), like transformers' router."""
    tokens = hidden_states.reshape(-1, router.hidden_dim)
    logits = torch.nn.functional.linear(tokens.float(), router.weight.float())
    weights, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(hidden_states.dtype), chosen


def is_sparse(config: Any) -> bool:
    """Return whether a LLaVA's decoder is a mixture of experts."""
    return config.text_config.model_type == SPARSE_TYPE


def count_activated(config: Any, sizes: Mapping[str, int]) -> int:
    """Count the parameters of a LLaVA that one token activates: only k of a layer's experts."""
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    if not experts:
        return sum(sizes.values())
    text = config.text_config
    return sum(sizes.values()) - experts + experts * text.num_experts_per_tok // text.num_experts


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each layer's stacked experts into one tensor each, under the names of public checkpoints.

    `experts.gate_up_proj` (e, 2 * i, d) becomes `experts.0.gate_proj.weight` (i, d), `experts.0.up_proj.weight`, …
    """
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, stacked, leaf = name.rpartition(".experts.")
        if not stacked or leaf not in ("gate_up_proj", "down_proj"):
            single[name] = tensor
            continue
        for number, weight in enumerate(tensor):
            pieces = (
                zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True)
                if leaf == "gate_up_proj"
                else ((leaf, weight),)
            )
            for piece, part in pieces:
                single[f"{prefix}.experts.{number}.{piece}.weight"] = part.contiguous()
    return single


def _make_tensor(
    name: str, wanted: Tensor, dense: Mapping[str, Tensor], config: Any, generator: torch.Generator
) -> Tensor:
    prefix = name.rpartition(".mlp.")[0] + ".mlp"
    if name.endswith(".experts.gate_up_proj"):
        both = torch.cat([dense[f"{prefix}.gate_proj.weight"], dense[f"{prefix}.up_proj.weight"]])
        return both.repeat(config.num_experts, 1, 1)
    if name.endswith(".experts.down_proj"):
        return dense[f"{prefix}.down_proj.weight"].repeat(config.num_experts, 1, 1)
    if name.endswith(".mlp.gate.weight"):
        return torch.randn(wanted.shape, generator=generator) * config.initializer_range
    if is_empty_expert(name, config):
        return torch.zeros(wanted.shape)
    raise ConfigError(f"moe: the dense student has no tensor {name}")
