"""Makes a LLaVA's processor of a decoder's tokenizer, a tower's image preprocessing and a chat template.

`<image>` becomes one special token, with the next free id (151646 of Qwen1.5 and Qwen2, 151665 of Qwen2.5). The
decoder's embedding has rows for it already, or gets them. The template writes the tokenizer's end-of-sequence token
after an answer. The decoder's own chat template, which base models of Qwen have too, is replaced.
"""

from __future__ import annotations

import importlib
from math import isqrt
from typing import Any, Literal

from storage.errors import ConfigError
from student_train.models.huggingface import import_transformers
from student_train.models.tower_features import TowerFeatures, read_image_size

IMAGE_TOKEN = "<image>"
_IMAGE_SETTINGS = (
    "size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize", "do_center_crop",
    "do_rescale", "do_normalize", "do_convert_rgb",
)  # fmt: skip


def make_processor(
    image_processor: Any,
    tokenizer: Any,
    features: TowerFeatures,
    *,
    template: str,
    select: Literal["full", "default"],
    pad_to_square: bool,
    place: str,
) -> Any:
    """Make the processor; `place`: of the tower, for messages. It changes `tokenizer`.

    Errors: ConfigError for a tower whose grid is not known, and for a tokenizer without an end-of-sequence token.
    """
    add_special_tokens(tokenizer)
    tokenizer.chat_template = template
    if features.num_prefix is None:
        raise ConfigError(
            f"{place}: how many of its {features.num_positions} positions are patches is not known, so no processor "
            "can be made; give compose.processor"
        )
    height, _ = read_image_size(image_processor)
    assert height is not None
    grid = isqrt(features.num_positions - features.num_prefix)
    return import_transformers().LlavaProcessor(
        image_processor=_pad_images(image_processor) if pad_to_square else image_processor,
        tokenizer=tokenizer,
        patch_size=height // max(grid, 1),
        num_additional_image_tokens=features.num_prefix,
        vision_feature_select_strategy=select,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def add_special_tokens(tokenizer: Any) -> None:
    """Add `<image>` as one special token, and a padding token where there is none. Errors: ConfigError."""
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"compose.llm: {name} has no eos_token, which the template writes after an answer; give a decoder with one"
        )
    tokens = importlib.import_module("tokenizers")
    image = tokens.AddedToken(IMAGE_TOKEN, special=True, normalized=False, lstrip=False, rstrip=False)
    tokenizer.add_tokens([image], special_tokens=True)
    if tokenizer(IMAGE_TOKEN, add_special_tokens=False)["input_ids"] != [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]:
        raise ConfigError(
            f"compose.llm: {name} does not make one token of {IMAGE_TOKEN}; give compose.processor instead of template"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _pad_images(image_processor: Any) -> Any:
    """Return LLaVA's image processor, which pads to a square with the mean colour, of the same settings."""
    module = importlib.import_module("transformers.models.llava.image_processing_pil_llava")
    settings = {name: getattr(image_processor, name, None) for name in _IMAGE_SETTINGS}
    given = {name: value for name, value in settings.items() if value is not None}
    return module.LlavaImageProcessorPil(**given | {"do_center_crop": bool(given.get("do_center_crop"))}, do_pad=True)
