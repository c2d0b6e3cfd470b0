"""MoE-LLaVA's and LLaVA-MoD's checkpoints: experts under DeepSpeed's names, as a Qwen2-MoE without shared expert.

DeepSpeed draws the second of two experts at random (Gumbel noise), in evaluation too, and drops tokens beyond an
expert's capacity. Qwen2-MoE does neither: it takes the two likeliest, for every token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.conversion.chat_templates import get_template
from stillhouse.conversion.conversion import Conversion, Options, get_required, read_layer, rename
from stillhouse.conversion.processor_files import (
    Vision,
    check_template,
    load_source_tokenizer,
    make_config,
    read_strategy,
    read_tower_config,
)
from stillhouse.conversion.source_tensors import list_tensors, list_weight_files
from stillhouse.conversion.tensor_plan import MapName, Piece
from storage.errors import ConfigError

NAME = "moe_llava"
DECODERS = {"moe_llava_qwen": "qwen", "moe_llava_qwen1_5": "qwen2", "moe_llava_qwen2": "qwen2"}
REFUSED = ("moe_llava_phi", "moe_llava_stablelm", "moe_llava_minicpm", "moe_llava_llama", "moe_llava_mistral")
_TOWER = r"(?:model|transformer)\.image_tower\.image_tower\.vision_model\."
_PROJECTOR = r"(?:model|transformer)\.mm_projector\.image_spatial_proj\."
_SHARED = (
    (rf"{_TOWER}(.*)", r"vision_tower.vision_model.\1"),
    (rf"{_PROJECTOR}0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (rf"{_PROJECTOR}2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
)
_EXPERT = r"mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\."
_QWEN2 = (
    (r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight", r"language_model.model.layers.\1.mlp.gate.weight"),
    (rf"model\.layers\.(\d+)\.{_EXPERT}(.*)", r"language_model.model.layers.\1.mlp.experts.\2.\3"),
    (r"model\.(embed_tokens|layers|norm)\.((?!.*deepspeed_moe).*)", r"language_model.model.\1.\2"),
)
_LAYER = r"language_model.model.layers.\1."
_QWEN1 = (
    (r"transformer\.h\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight", rf"{_LAYER}mlp.gate.weight"),
    (rf"transformer\.h\.(\d+)\.{_EXPERT}w1\.weight", rf"{_LAYER}mlp.experts.\2.up_proj.weight"),
    (rf"transformer\.h\.(\d+)\.{_EXPERT}w2\.weight", rf"{_LAYER}mlp.experts.\2.gate_proj.weight"),
    (rf"transformer\.h\.(\d+)\.{_EXPERT}c_proj\.weight", rf"{_LAYER}mlp.experts.\2.down_proj.weight"),
    (r"transformer\.h\.(\d+)\.mlp\.w1\.weight", rf"{_LAYER}mlp.up_proj.weight"),
    (r"transformer\.h\.(\d+)\.mlp\.w2\.weight", rf"{_LAYER}mlp.gate_proj.weight"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight", rf"{_LAYER}mlp.down_proj.weight"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.weight", rf"{_LAYER}self_attn.o_proj.weight"),
    (r"transformer\.h\.(\d+)\.ln_1\.weight", rf"{_LAYER}input_layernorm.weight"),
    (r"transformer\.h\.(\d+)\.ln_2\.weight", rf"{_LAYER}post_attention_layernorm.weight"),
    (r"transformer\.wte\.weight", r"language_model.model.embed_tokens.weight"),
    (r"transformer\.ln_f\.weight", r"language_model.model.norm.weight"),
)
_JOINED = re.compile(r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)")
_RESIDUAL = re.compile(r"\.mlp\.(?:mlp|coefficient)\.")
_DROPPED = (".rotary_emb.inv_freq", ".position_ids")


def read(folder: Path, config: Mapping[str, Any], options: Options) -> Conversion:
    """Read a checkpoint's description. Errors: ConfigError for what cannot be mapped, by its key."""
    place = folder / "config.json"
    kind = config.get("model_type")
    if kind not in DECODERS:
        raise ConfigError(
            f"{place}: model_type is {kind!r}, whose sparse decoder transformers has no class for; expected one of "
            f"{', '.join(DECODERS)}"
        )
    moe = get_required(config, "moe", place)
    decoder, notes = _read_decoder(config, moe, place)
    if config.get("image_projector_type") != "mlp2x_gelu":
        raise ConfigError(
            f"{place}: image_projector_type is {config.get('image_projector_type')!r}, expected mlp2x_gelu"
        )
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect not in ("square", "pad"):
        raise ConfigError(f"{place}: image_aspect_ratio is {aspect!r}, expected square or pad")
    name = get_required(config, "mm_image_tower", place)
    vision = Vision(
        read_tower_config(name, folder=options.vision_tower, place=f"{place}: mm_image_tower"),
        read_layer(get_required(config, "mm_vision_select_layer", place), place=f"{place}: mm_vision_select_layer"),
        read_strategy(config.get("mm_vision_select_feature", "patch"), place=f"{place}: mm_vision_select_feature"),
        aspect,
    )
    tokenizer = load_source_tokenizer(options.tokenizer or folder, decoder)
    template = get_template(options.template or "moe_llava")
    check_template(template, tokenizer, place=f"{folder}")
    files = list_weight_files(folder)
    if not any(re.match(_TOWER, tensor.name) for tensor in list_tensors(files)):
        raise ConfigError(f"{folder}: has no weights of the image tower (image_tower.image_tower.vision_model.…)")
    return Conversion(
        NAME, decoder, vision, files, _make_map(DECODERS[kind], place), tokenizer, template, notes=tuple(notes)
    )


def _read_decoder(config: Mapping[str, Any], moe: Mapping[str, Any], place: Path) -> tuple[Any, list[str]]:
    experts = moe.get("num_experts")
    counts = set(experts) if isinstance(experts, list) else {experts}
    if len(counts) != 1 or not isinstance(num_experts := counts.pop(), int):
        raise ConfigError(f"{place}: moe.num_experts is {experts!r}, expected one number for all sparse layers")
    if moe.get("use_residual"):
        raise ConfigError(f"{place}: moe.use_residual is set: a dense MLP beside the experts cannot be mapped")
    top_k = moe.get("top_k_experts")
    if top_k not in (1, 2):
        raise ConfigError(f"{place}: moe.top_k_experts is {top_k!r}, expected 1 or 2")
    num_layers = get_required(config, "num_hidden_layers", place)
    sparse = _find_sparse_layers(moe, num_layers, place)
    common = _read_qwen1(config, place) if config["model_type"] == "moe_llava_qwen" else _read_qwen2(config, place)
    decoder = make_config(
        {
            **common,
            "model_type": "qwen2_moe",
            "num_hidden_layers": num_layers,
            "num_experts": num_experts,
            "num_experts_per_tok": top_k,
            "norm_topk_prob": top_k == 2,  # of one expert DeepSpeed takes the softmax value as it is
            "moe_intermediate_size": common["intermediate_size"],
            "shared_expert_intermediate_size": 0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(num_layers) if layer not in sparse],
            "architectures": ["Qwen2MoeForCausalLM"],  # vLLM finds the decoder in a LLaVA by it
        },
        place=f"{place}",
    )
    notes = _describe(moe, num_experts, top_k)
    if config["model_type"] == "moe_llava_qwen":
        notes.append(
            f"the context is {decoder.max_position_embeddings} tokens (seq_length): beyond them the first Qwen changes "
            "its attention, which cannot be mapped"
        )
    return decoder, notes


def _describe(moe: Mapping[str, Any], num_experts: int, top_k: int) -> list[str]:
    notes = []
    if top_k == 2:
        notes.append(
            "the source draws each token's second expert at random, in evaluation too; the target takes the second "
            "likeliest, so its outputs do not depend on chance"
        )
    for key, when in (("eval_capacity_factor", "in evaluation"), ("capacity_factor", "in training")):
        factor = moe.get(key)
        if factor is None:
            notes.append(f"moe.{key} is not given: {when} the source may drop tokens; the target never does")
        elif top_k * factor < num_experts:
            notes.append(
                f"{when} the source drops tokens beyond {top_k * factor / num_experts:.0%} of a batch for each expert "
                f"(moe.{key} {factor}); this cannot be mapped: the target never drops any"
            )
    return notes


def _find_sparse_layers(moe: Mapping[str, Any], num_layers: int, place: Path) -> set[int]:
    given, mode = moe.get("moe_layers_idx"), moe.get("moe_mode")
    by_mode = {
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    layers = by_mode.get(str(mode)) if given is None else given
    if layers is None or not set(layers) <= set(range(num_layers)):
        raise ConfigError(
            f"{place}: moe.moe_layers_idx is {given!r} and moe.moe_mode {mode!r}; expected numbers of the {num_layers} "
            f"layers, or a mode of {', '.join(by_mode)}"
        )
    return set(layers)


def _read_qwen2(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    optional = (
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "hidden_act", "tie_word_embeddings",
        "bos_token_id", "pad_token_id", "use_sliding_window", "sliding_window", "max_window_layers",
    )  # fmt: skip
    settings = {key: get_required(config, key, place) for key in required}
    return settings | {key: config[key] for key in optional if config.get(key) is not None}


def _read_qwen1(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return Qwen2-MoE's settings of the first Qwen's: its two MLP matrices have half of intermediate_size each."""
    width, heads = get_required(config, "hidden_size", place), get_required(config, "num_attention_heads", place)
    if config.get("kv_channels", width // heads) != width // heads:
        raise ConfigError(
            f"{place}: kv_channels is {config['kv_channels']}, expected {width // heads}, the heads' width"
        )
    if config.get("rotary_pct", 1.0) != 1.0 or not config.get("no_bias", True):
        raise ConfigError(f"{place}: rotary_pct and no_bias must be 1.0 and true, as in Qwen's published models")
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": get_required(config, "intermediate_size", place) // 2,
        "vocab_size": get_required(config, "vocab_size", place),
        "max_position_embeddings": config.get("seq_length", config.get("max_position_embeddings", 2048)),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _make_map(kind: str, place: Path) -> MapName:
    rules = (*_SHARED, *(_QWEN1 if kind == "qwen" else _QWEN2))

    def map_name(name: str) -> Sequence[Piece] | None:
        if name.endswith(_DROPPED):
            return ()
        if _RESIDUAL.search(name):
            raise ConfigError(f"{place.parent}: tensor {name} belongs to a residual expert, which cannot be mapped")
        joined = _JOINED.fullmatch(name) if kind == "qwen" else None
        if joined is None:
            return rename(name, rules)
        prefix = f"language_model.model.layers.{joined[1]}.self_attn."
        return [
            Piece(f"{prefix}{part}_proj.{joined[2]}", partial(_take_third, number=number))
            for number, part in enumerate("qkv")
        ]

    return map_name


def _take_third(tensor: Tensor, *, number: int) -> Tensor:
    return tensor.chunk(3, dim=0)[number]
