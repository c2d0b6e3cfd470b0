"""Tiny random checkpoints of the Qwen3 family: a text decoder, Qwen3-VL dense and sparse, Qwen3.5 with vision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN, make_tiny_tokenizer
from tests.tiny_parts import TEXT, name_ends, save_random

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_SPECIAL = ("<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,  # interpolated for other grids
}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}  # their features are added after the decoder's first two layers
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}


def make_qwen3_vl(folder: Path) -> Path:
    """DeepStack: features of two layers of the tower join the decoder's first two; interleaved M-RoPE."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    processor = make_qwen3_processor()
    text = {**TEXT, "head_dim": 32, "num_hidden_layers": 3}
    config = Qwen3VLConfig(vision_config={**_VISION, **_DEEPSTACK}, **_settings(processor.tokenizer, text))
    return save_random(folder, lambda: Qwen3VLForConditionalGeneration(config), processor)


def make_qwen3_vl_moe(folder: Path) -> Path:
    """As Qwen3-VL, with two of four experts for each token."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    processor = make_qwen3_processor()
    text = {**TEXT, "head_dim": 32, "num_hidden_layers": 3, **_EXPERTS, "tie_word_embeddings": False}
    config = Qwen3VLMoeConfig(vision_config={**_VISION, **_DEEPSTACK}, **_settings(processor.tokenizer, text))
    return save_random(folder, lambda: Qwen3VLMoeForConditionalGeneration(config), processor)


def make_qwen3_5(folder: Path) -> Path:
    """Qwen3-VL without DeepStack; a layer of linear attention (a gated delta net) and one of full attention."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    processor = make_qwen3_processor()
    text = {
        **TEXT, "head_dim": 64, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    config = Qwen3_5Config(vision_config=_VISION, **_settings(processor.tokenizer, text, partial=0.5))
    return save_random(folder, lambda: Qwen3_5ForConditionalGeneration(config), processor, louder=3)


def make_qwen3_processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = make_tiny_tokenizer((*_SPECIAL, "<|image_pad|>"), image_token="<|image_pad|>")
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=8, size=size),
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, QWEN_IMAGE),
    )


def _settings(tokenizer: Any, text: dict[str, Any], *, partial: float = 1.0) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    if partial != 1.0:
        rope["partial_rotary_factor"] = partial
    return {
        "text_config": {**text, **name_ends(tokenizer), "rope_parameters": rope},
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
