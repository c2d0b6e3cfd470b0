"""Tiny random checkpoints of the architectures that a teacher may have, each with its own processor.

Every processor is built from parts, so nothing is downloaded. Images become different numbers of visual tokens by
their sizes wherever the architecture knows such a thing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN, SPECIAL_TOKENS, make_tiny_tokenizer
from tests.tiny_gemma import make_gemma3, make_gemma4
from tests.tiny_parts import SIGLIP, TEXT, VOCAB_SIZE, name_ends, save_random
from tests.tiny_qwen3 import QWEN_IMAGE, make_qwen3_5, make_qwen3_vl, make_qwen3_vl_moe

_TILE_TOKENS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))


def make_text_only(folder: Path, *, kind: str, tied: bool, **fields: Any) -> Path:
    """A decoder without images: `llama`, `qwen2` or `qwen3`, with more fields of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tiny_tokenizer(SPECIAL_TOKENS[:-1], image_token=None)
    config = AutoConfig.for_model(kind, **TEXT, **name_ends(tokenizer), **fields, tie_word_embeddings=tied)
    save_random(folder, lambda: AutoModelForCausalLM.from_config(config), tokenizer)
    return folder


def make_llava(folder: Path) -> Path:
    """LLaVA-1.5: a fixed grid of 16 visual tokens; a Llama decoder whose tokenizer starts with a special token."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

    tokenizer = make_tiny_tokenizer()
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        text_config={"model_type": "llama", **TEXT, **name_ends(tokenizer)},
        image_token_index=VOCAB_SIZE - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    save_random(folder, lambda: LlavaForConditionalGeneration(config), processor)
    return folder


def make_llava_onevision(folder: Path) -> Path:
    """Any-resolution tiles of 4 x 4 visual tokens, with a newline feature after each row of the large picture."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    video = "<video>"
    tokenizer = make_tiny_tokenizer((*SPECIAL_TOKENS[:-1], video, IMAGE_TOKEN))
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        text_config={"model_type": "qwen2", **TEXT, **name_ends(tokenizer)},
        image_token_index=VOCAB_SIZE - 1,
        video_token_index=VOCAB_SIZE - 2,
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": 32, "width": 32}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    save_random(folder, lambda: LlavaOnevisionForConditionalGeneration(config), processor)
    return folder


def make_qwen2_vl(folder: Path) -> Path:
    """Dynamic resolution: 1 to 16 visual tokens in an image's own proportions, multimodal rotary positions."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 8}
    processor = _qwen_processor()
    config = Qwen2VLConfig(vision_config=vision, **_qwen_settings(processor.tokenizer))
    save_random(folder, lambda: Qwen2VLForConditionalGeneration(config), processor)
    return folder


def make_qwen2_5_vl(folder: Path) -> Path:
    """As Qwen2-VL, with windowed attention in the vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
        "out_hidden_size": 128, "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    processor = _qwen_processor()
    config = Qwen2_5_VLConfig(vision_config=vision, **_qwen_settings(processor.tokenizer))
    save_random(folder, lambda: Qwen2_5_VLForConditionalGeneration(config), processor, louder=2)
    return folder


def make_idefics3(folder: Path) -> Path:
    """Tiles of 4 visual tokens between separator tokens that name row and column."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

    tokenizer, settings = _tiled()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    save_random(folder, lambda: Idefics3ForConditionalGeneration(Idefics3Config(**settings)), processor)
    return folder


def make_smolvlm(folder: Path) -> Path:
    """Idefics3's tiles under SmolVLM's names."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer, settings = _tiled()
    size, tile = {"longest_edge": 64}, {"longest_edge": 32}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=tile),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=tile),
        image_seq_len=4,
        chat_template=CHAT_TEMPLATE,
    )
    save_random(folder, lambda: SmolVLMForConditionalGeneration(SmolVLMConfig(**settings)), processor)
    return folder


def make_internvl(folder: Path) -> Path:
    """Tiles of 16 patches that pixel shuffle turns into 4 visual tokens, and a thumbnail where there are several."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    names["context_image_token"] = context = "<IMG_CONTEXT>"
    tokenizer = make_tiny_tokenizer((*SPECIAL_TOKENS[:-1], *names.values()), image_token=context, named_tokens=names)
    vision = {**SIGLIP, "image_size": [32, 32], "patch_size": [8, 8]}
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT, **name_ends(tokenizer)},
        image_token_id=VOCAB_SIZE - 1,
        image_seq_length=4,
    )
    size = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, context),
    )
    return save_random(folder, lambda: InternVLForConditionalGeneration(config), processor)


def make_gpt_oss(folder: Path) -> Path:
    """Sparse, with attention sinks and a sliding window in every other layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    tokenizer = make_tiny_tokenizer(SPECIAL_TOKENS[:-1], image_token=None)
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**TEXT, **name_ends(tokenizer), **experts, head_dim=32, rope_parameters=rope)
    return save_random(folder, lambda: GptOssForCausalLM(config), tokenizer)


def make_llama4_text(folder: Path) -> Path:
    """Llama 4's decoder: sparse, attention in chunks, and a last layer without positions."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    tokenizer = make_tiny_tokenizer(SPECIAL_TOKENS[:-1], image_token=None)
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128}
    config = Llama4TextConfig(
        **TEXT, **name_ends(tokenizer), **experts, head_dim=32, no_rope_layers=[1, 0], attention_chunk_size=64
    )
    return save_random(folder, lambda: Llama4ForCausalLM(config), tokenizer)


TEXT_ONLY = ("llama", "qwen2", "qwen3", "gpt_oss", "llama4_text")
REFUSED_STUDENTS = {"gemma4": "has final_logit_softcapping = 30.0"}  # and what the refusal says
PUBLISHED = {  # families of published checkpoints, for the documentation
    "llama": "Llama 2 and 3, Vicuna, TinyLlama",
    "qwen2": "Qwen2, Qwen2.5",
    "llava": "LLaVA-1.5",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "idefics3": "Idefics3, SmolVLM",
    "smolvlm": "SmolVLM2",
    "qwen3": "Qwen3",
    "qwen3_vl": "Qwen3-VL, dense",
    "qwen3_vl_moe": "Qwen3-VL, sparse",
    "internvl": "InternVL3, InternVL3.5 in transformers' form (`-hf`)",
    "gemma3": "Gemma 3 with vision",
    "gemma4": "Gemma 4",
    "qwen3_5": "Qwen3.5 with vision",
    "gpt_oss": "gpt-oss",
    "llama4_text": "Llama 4, its decoder",
}
ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: make_text_only(folder, kind="llama", tied=False),
    "qwen2": lambda folder: make_text_only(folder, kind="qwen2", tied=True),
    "llava": make_llava,
    "llava_onevision": make_llava_onevision,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
    "qwen3": lambda folder: make_text_only(folder, kind="qwen3", tied=True, head_dim=32),
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "internvl": make_internvl,
    "gemma3": make_gemma3,
    "gemma4": make_gemma4,
    "qwen3_5": make_qwen3_5,
    "gpt_oss": make_gpt_oss,
    "llama4_text": make_llama4_text,
}


def make_teacher(folder: Path, architecture: str) -> Path:
    """A checkpoint of one of ARCHITECTURES, in `folder`."""
    from storage.processes import torchvision_shim

    torchvision_shim.import_torch_companions()
    return ARCHITECTURES[architecture](folder)


def _qwen_processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = ("<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = make_tiny_tokenizer((*special, "<|image_pad|>"), image_token="<|image_pad|>")
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8, size=size),
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, QWEN_IMAGE),
    )


def _qwen_settings(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {
        "text_config": {**TEXT, **name_ends(tokenizer), "rope_parameters": rope},
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


def _tiled() -> tuple[Any, dict[str, Any]]:
    """Tokenizer and settings of the Idefics3 family."""
    special = ("<end_of_utterance>", "<fake_token_around_image>", "<global-img>", *_TILE_TOKENS)
    tokenizer = make_tiny_tokenizer((*SPECIAL_TOKENS[:-1], *special, IMAGE_TOKEN))
    return tokenizer, {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "llama", **TEXT, **name_ends(tokenizer)},
        "image_token_id": VOCAB_SIZE - 1,
        "pad_token_id": tokenizer.pad_token_id,
        "scale_factor": 2,
    }
