"""Tiny random checkpoints of the architectures that a teacher may have, each with its own processor.

Every processor is built from parts, so nothing is downloaded. Images become different numbers of visual tokens by
their sizes wherever the architecture knows such a thing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN, SPECIAL_TOKENS, make_tiny_tokenizer

VOCAB_SIZE = 300  # of every tokenizer here
PADDED_VOCAB = 320  # rows of the head
_TILE_TOKENS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TEXT: dict[str, Any] = {
    "vocab_size": PADDED_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,  # of 32, what vLLM's CPU attention takes
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def make_text_only(folder: Path, *, kind: str, tied: bool) -> Path:
    """A decoder without images: `llama` or `qwen2`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tiny_tokenizer(SPECIAL_TOKENS[:-1], image_token=None)
    config = AutoConfig.for_model(kind, **_TEXT, **_ends(tokenizer), tie_word_embeddings=tied)
    _save(folder, lambda: AutoModelForCausalLM.from_config(config), tokenizer)
    return folder


def make_llava(folder: Path) -> Path:
    """LLaVA-1.5: a fixed grid of 16 visual tokens; a Llama decoder whose tokenizer starts with a special token."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

    tokenizer = make_tiny_tokenizer()
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_SIGLIP},
        text_config={"model_type": "llama", **_TEXT, **_ends(tokenizer)},
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
    _save(folder, lambda: LlavaForConditionalGeneration(config), processor)
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
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_SIGLIP},
        text_config={"model_type": "qwen2", **_TEXT, **_ends(tokenizer)},
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
    _save(folder, lambda: LlavaOnevisionForConditionalGeneration(config), processor)
    return folder


def make_qwen2_vl(folder: Path) -> Path:
    """Dynamic resolution: 1 to 16 visual tokens in an image's own proportions, multimodal rotary positions."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 8}
    processor = _qwen_processor()
    config = Qwen2VLConfig(vision_config=vision, **_qwen_settings(processor.tokenizer))
    _save(folder, lambda: Qwen2VLForConditionalGeneration(config), processor)
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
    _save(folder, lambda: Qwen2_5_VLForConditionalGeneration(config), processor)
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
    _save(folder, lambda: Idefics3ForConditionalGeneration(Idefics3Config(**settings)), processor)
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
    _save(folder, lambda: SmolVLMForConditionalGeneration(SmolVLMConfig(**settings)), processor)
    return folder


ARCHITECTURES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: make_text_only(folder, kind="llama", tied=False),
    "qwen2": lambda folder: make_text_only(folder, kind="qwen2", tied=True),
    "llava": make_llava,
    "llava_onevision": make_llava_onevision,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
}


def make_teacher(folder: Path, architecture: str) -> Path:
    """A checkpoint of one of ARCHITECTURES, in `folder`."""
    from storage.processes import torchvision_shim

    torchvision_shim.import_torch_companions()
    return ARCHITECTURES[architecture](folder)


def _ends(tokenizer: Any) -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _qwen_processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = ("<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer = make_tiny_tokenizer((*special, "<|image_pad|>"), image_token="<|image_pad|>")
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8, size=size),
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, _QWEN_IMAGE),
    )


def _qwen_settings(tokenizer: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {
        "text_config": {**_TEXT, **_ends(tokenizer), "rope_parameters": rope},
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
        "vision_config": _SIGLIP,
        "text_config": {"model_type": "llama", **_TEXT, **_ends(tokenizer)},
        "image_token_id": VOCAB_SIZE - 1,
        "pad_token_id": tokenizer.pad_token_id,
        "scale_factor": 2,
    }


def _save(folder: Path, build: Callable[[], Any], processor: Any) -> None:
    """Random weights that let every part be seen in the output, and the processor, as a checkpoint."""
    import torch

    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif parameter.dim() >= 2 and "embed" not in name.rsplit(".", 2)[-2]:
                parameter.normal_(0, (parameter.numel() / len(parameter)) ** -0.5)
            elif parameter.dim() >= 2 or "newline" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
