"""Tiny random checkpoints in foreign formats: the same names, keys and files as the public ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from storage.processes import torchvision_shim
from student_train.models.huggingface import import_transformers
from tests.tiny import make_tiny_tokenizer

torchvision_shim.import_torch_companions()  # as in all tests: later ones build processors that need torchvision
import_transformers()  # before any other import of it, which would find the packages that this one hides

NUM_TOKENS = 300  # of the tokenizer, without <image>
HIDDEN, WIDTH, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 64, 96, 2, 2, 1
TOWER, TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 32, 48, 3, 2
IMAGE_SIZE, PATCH = 32, 8
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>")


def draw(shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Tensor]:
    """Draw tensors: norms near 1, everything else large enough that each tensor changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_norm = name.endswith(".weight") and ("norm" in name or "ln_" in name)
        tensors[name] = 1 + 0.2 * values if is_norm else 0.25 * values
    return tensors


def list_tower(prefix: str, kind: str, *, num_layers: int = TOWER_LAYERS, head: bool = True) -> dict[str, tuple]:
    """List names and shapes of a CLIP or SigLIP tower; `prefix` ends with `vision_model.`."""
    num_positions = (IMAGE_SIZE // PATCH) ** 2 + (kind == "clip")
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (num_positions, TOWER),
    }
    norms = ["post_layernorm"]
    if kind == "clip":
        shapes["embeddings.class_embedding"] = (TOWER,)
        norms.append("pre_layrnorm")
    else:
        shapes["embeddings.patch_embedding.bias"] = (TOWER,)
    for layer in range(num_layers):
        name = f"encoder.layers.{layer}"
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
        for part in ("q", "k", "v", "out"):
            shapes |= _linear(f"{name}.self_attn.{part}_proj", TOWER, TOWER)
        shapes |= _linear(f"{name}.mlp.fc1", TOWER_WIDTH, TOWER) | _linear(f"{name}.mlp.fc2", TOWER, TOWER_WIDTH)
    if kind == "siglip" and head:
        norms.append("head.layernorm")
        shapes |= {"head.probe": (1, 1, TOWER), "head.attention.in_proj_weight": (3 * TOWER, TOWER)}
        shapes |= {"head.attention.in_proj_bias": (3 * TOWER,)} | _linear("head.attention.out_proj", TOWER, TOWER)
        shapes |= _linear("head.mlp.fc1", TOWER_WIDTH, TOWER) | _linear("head.mlp.fc2", TOWER, TOWER_WIDTH)
    for norm in norms:
        shapes |= {f"{norm}.weight": (TOWER,), f"{norm}.bias": (TOWER,)}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def list_decoder(
    prefix: str, *, rows: int, biased: bool = True, experts: Mapping[int, int] | None = None
) -> dict[str, tuple]:
    """List a decoder of Llama's form without its head. `experts`: how many a layer has, under DeepSpeed's names."""
    kv = HIDDEN // NUM_HEADS * NUM_KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (rows, HIDDEN), "norm.weight": (HIDDEN,)}
    for layer in range(NUM_LAYERS):
        name = f"layers.{layer}"
        shapes |= {f"{name}.input_layernorm.weight": (HIDDEN,), f"{name}.post_attention_layernorm.weight": (HIDDEN,)}
        for part, size in (("q", HIDDEN), ("k", kv), ("v", kv)):
            shapes |= _linear(f"{name}.self_attn.{part}_proj", size, HIDDEN, biased=biased)
        shapes[f"{name}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        number = (experts or {}).get(layer)
        moe = f"{name}.mlp.deepspeed_moe"
        places = [f"{name}.mlp"]
        if number:
            shapes[f"{moe}.gate.wg.weight"] = (number, HIDDEN)
            places = [f"{moe}.experts.deepspeed_experts.{expert}" for expert in range(number)]
        for place in places:
            shapes |= {f"{place}.{part}_proj.weight": (WIDTH, HIDDEN) for part in ("gate", "up")}
            shapes[f"{place}.down_proj.weight"] = (HIDDEN, WIDTH)
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def list_qwen1(prefix: str, *, rows: int, experts: Mapping[int, int]) -> dict[str, tuple]:
    """List the first Qwen's decoder without its head; some layers have experts under DeepSpeed's names."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (rows, HIDDEN), "ln_f.weight": (HIDDEN,)}
    for layer in range(NUM_LAYERS):
        name = f"h.{layer}"
        shapes |= {f"{name}.ln_1.weight": (HIDDEN,), f"{name}.ln_2.weight": (HIDDEN,)}
        shapes |= _linear(f"{name}.attn.c_attn", 3 * HIDDEN, HIDDEN)
        shapes[f"{name}.attn.c_proj.weight"] = (HIDDEN, HIDDEN)
        moe = f"{name}.mlp.deepspeed_moe"
        places = [f"{name}.mlp"]
        if layer in experts:
            shapes[f"{moe}.gate.wg.weight"] = (experts[layer], HIDDEN)
            places = [f"{moe}.experts.deepspeed_experts.{expert}" for expert in range(experts[layer])]
        for place in places:
            shapes |= {f"{place}.w1.weight": (WIDTH, HIDDEN), f"{place}.w2.weight": (WIDTH, HIDDEN)}
            shapes[f"{place}.c_proj.weight"] = (HIDDEN, WIDTH)
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def list_projector(prefix: str) -> dict[str, tuple]:
    """List a two-layer projector: layers 0 and 2 of a Sequential."""
    return _linear(f"{prefix}0", HIDDEN, TOWER) | _linear(f"{prefix}2", HIDDEN, HIDDEN)


def _linear(name: str, outputs: int, inputs: int, *, biased: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if biased else {})


def make_tower_settings(kind: str) -> dict[str, Any]:
    """Return a tower's config.json."""
    return {
        "model_type": f"{kind}_vision_model", "hidden_size": TOWER, "intermediate_size": TOWER_WIDTH,
        "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": TOWER_HEADS, "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }  # fmt: skip


def make_decoder_settings(kind: str, *, rows: int, tied: bool = False) -> dict[str, Any]:
    """Return a decoder's settings with old key names, as the foreign configurations have them."""
    return {
        "model_type": kind, "vocab_size": rows, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 512, "rope_theta": 5000.0, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6,
        "torch_dtype": "float32", "architectures": [f"{kind}ForCausalLM"],
        **({"head_dim": HIDDEN // NUM_HEADS} if kind == "gemma" else {}),
    }  # fmt: skip


def save_tokenizer(folder: Path, tokens: Sequence[str], *, eos: str) -> None:
    """Write a tokenizer of NUM_TOKENS tokens without image token and without chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(make_tiny_tokenizer(tokens, image_token=None).backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in tokens]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=eos)
    assert len(tokenizer) == NUM_TOKENS
    tokenizer.save_pretrained(folder)


def save_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def save_shards(folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int = 2) -> None:
    """Write safetensors shards with their index."""
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        held = {name: tensors[name].contiguous().clone() for name in names[number::num_shards]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    save_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def make_picture(size: tuple[int, int] = (41, 29), *, seed: int = 3) -> Image.Image:
    """Return a random picture that is no square."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def make_tinyllava(
    folder: Path,
    *,
    decoder: str = "qwen2",
    tower: str = "siglip",
    tied: bool = True,
    rows: int = 320,
    parts: bool = False,  # a folder for each part, as pretraining writes them
    eos: str | None = None,
    **keys: Any,
) -> dict[str, Tensor]:
    """Write a TinyLLaVA checkpoint; return its tensors with the names of a whole one."""
    tokens = {"qwen2": QWEN_TOKENS, "llama": LLAMA_TOKENS, "gemma": GEMMA_TOKENS}[decoder]
    ends = {"qwen2": "<|endoftext|>", "llama": "</s>", "gemma": "<eos>"}
    shapes = list_decoder("language_model.model.", rows=rows, biased=decoder == "qwen2")
    shapes["language_model.lm_head.weight"] = (rows, HIDDEN)
    shapes |= list_tower("vision_tower._vision_tower.vision_model.", tower)
    shapes |= list_projector("connector._connector.")
    tensors = draw(shapes)
    if decoder == "gemma":  # its norms' weights are around 0
        tensors |= {n: v - 1 for n, v in tensors.items() if n.startswith("language_model") and "norm" in n}
    if tied:  # stored twice, as the public ones are
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    config = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": f"someone/{decoder}",
        "vision_model_name_or_path": f"someone/{tower}",
        "vision_model_name_or_path2": "",
        "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "tokenizer_model_max_length": 2048,
        "image_token_index": -200,
        "text_config": make_decoder_settings(decoder, rows=rows, tied=tied),
        "vision_config": make_tower_settings(tower),
    }
    save_json(folder / "config.json", config | keys)
    save_tokenizer(folder, tokens, eos=eos or ends[decoder])
    if not parts:
        save_shards(folder, tensors)
        return tensors
    prefixes = {
        "language_model": "language_model.",
        "vision_tower": "vision_tower._vision_tower.",
        "connector": "connector.",
    }
    for part, prefix in prefixes.items():
        (folder / part).mkdir()
        held = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if tied:
            held.pop("lm_head.weight", None)
        torch.save(held, folder / part / "pytorch_model.bin")
    return tensors


def make_llava(
    folder: Path, *, kind: str = "llava_llama", tower: str = "clip", with_tower: bool = True, **keys: Any
) -> dict[str, Tensor]:
    """Write a LLaVA checkpoint, and its tower as a checkpoint of its own at folder-tower; return all tensors."""
    is_qwen = kind == "llava_qwen"
    rows = 320 if is_qwen else NUM_TOKENS
    num_layers = TOWER_LAYERS - (tower == "siglip")  # LLaVA-NeXT's code deletes the last one
    shapes = list_decoder("model.", rows=rows, biased=is_qwen) | {"lm_head.weight": (rows, HIDDEN)}
    shapes |= list_projector("model.mm_projector.")
    tower_shapes = list_tower("model.vision_tower.vision_tower.vision_model.", tower)
    tensors = draw(shapes | tower_shapes)
    tower_folder = folder.with_name(f"{folder.name}-tower")
    save_json(tower_folder / "config.json", make_tower_settings(tower))
    prefix = "model.vision_tower.vision_tower."
    save_file(
        {name.removeprefix(prefix): tensors[name].clone() for name in tower_shapes}, tower_folder / "model.safetensors"
    )
    config = make_decoder_settings(kind, rows=rows) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower_folder),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_hidden_size": TOWER,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
    }
    save_json(folder / "config.json", config | keys)
    tokens, eos = (QWEN_TOKENS, "<|im_end|>") if is_qwen else (LLAMA_TOKENS, "</s>")
    save_tokenizer(folder, tokens, eos=eos)
    stored = dict(tensors)
    if not with_tower:
        stored = {name: value for name, value in tensors.items() if name not in tower_shapes}
    elif num_layers < TOWER_LAYERS:
        deleted = (f"{prefix}vision_model.encoder.layers.{num_layers}.", f"{prefix}vision_model.head.")
        stored = {name: value for name, value in tensors.items() if not name.startswith(deleted)}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    torch.save(stored, folder / "pytorch_model.bin")
    return tensors


def make_moe_llava(
    folder: Path, *, kind: str = "moe_llava_qwen2", top_k: int = 2, num_experts: int = 4, moe: Mapping | None = None
) -> dict[str, Tensor]:
    """Write a MoE-LLaVA checkpoint whose layer 0 is sparse; return its tensors."""
    is_first = kind == "moe_llava_qwen"
    base = "transformer." if is_first else "model."
    experts = {0: num_experts}
    shapes = list_qwen1(base, rows=320, experts=experts) if is_first else list_decoder(base, rows=320, experts=experts)
    shapes |= {"lm_head.weight": (320, HIDDEN)} | list_projector(f"{base}mm_projector.image_spatial_proj.")
    shapes |= list_tower(f"{base}image_tower.image_tower.vision_model.", "clip")
    tensors = draw(shapes)
    tower_folder = folder.with_name(f"{folder.name}-tower")
    save_json(tower_folder / "config.json", make_tower_settings("clip"))
    if is_first:
        decoder = {
            "vocab_size": 320, "hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "seq_length": 256,
            "num_attention_heads": NUM_HEADS, "kv_channels": HIDDEN // NUM_HEADS, "intermediate_size": 2 * WIDTH,
            "layer_norm_epsilon": 1e-6, "rotary_emb_base": 5000, "rotary_pct": 1.0, "no_bias": True,
        }  # fmt: skip
    else:
        decoder = make_decoder_settings("qwen2", rows=320)
    settings = {
        "moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": [0], "num_experts": [num_experts], "ep_size": 1,
        "top_k_experts": top_k, "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
        "use_residual": False,
    }  # fmt: skip
    config = decoder | {
        "model_type": kind,
        "mm_image_tower": str(tower_folder),
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "moe": settings | dict(moe or {}),
    }
    save_json(folder / "config.json", config)
    save_tokenizer(folder, QWEN_TOKENS, eos="<|endoftext|>")
    save_shards(folder, tensors)
    return tensors
