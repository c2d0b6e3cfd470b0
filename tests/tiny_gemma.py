"""Tiny random checkpoints of the Gemma family, in which tokens of an image see each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, IMAGE_TOKEN, SPECIAL_TOKENS, make_tiny_tokenizer
from tests.tiny_parts import PADDED_VOCAB, SIGLIP, TEXT, VOCAB_SIZE, name_ends, save_random

_BOI, _EOI, _SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
_GEMMA: dict[str, Any] = {**TEXT, "head_dim": 32, "num_hidden_layers": 3, "sliding_window": 64}
_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]


def make_gemma3(folder: Path) -> Path:
    """A fixed grid of 4 pooled visual tokens that see each other, between line breaks and separators.

    The chat template writes another token than the visual one.
    """
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    tokenizer = _tokenizer((_BOI, _EOI, _SOFT))
    config = Gemma3Config(
        text_config={**_GEMMA, "layer_types": _LAYERS, "query_pre_attn_scalar": 32, **name_ends(tokenizer)},
        vision_config={"vision_use_head": False, **SIGLIP},
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 1,
        boi_token_index=VOCAB_SIZE - 3,
        eoi_token_index=VOCAB_SIZE - 2,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, _BOI),
    )
    return save_random(folder, lambda: Gemma3ForConditionalGeneration(config), processor, embedding=0.1)


def make_gemma4(folder: Path) -> Path:
    """Up to 70 visual tokens in an image's own proportions, which see each other in layers with a sliding window.

    Logits are soft-capped, each layer reads an embedding of its own, and the last layer shares keys and values.
    """
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    audio = ("<boa>", "<eoa>", "<audio>")
    named: dict[str, str] = dict(zip(("boa_token", "eoa_token", "audio_token"), audio, strict=True))
    tokenizer = _tokenizer((*audio, "<|video|>", _BOI, _EOI, _SOFT), named)
    ids = tokenizer.convert_tokens_to_ids
    config = Gemma4Config(
        text_config={
            **_GEMMA, "layer_types": _LAYERS, "global_head_dim": 64, "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": "vision", "vocab_size_per_layer_input": PADDED_VOCAB,
            "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, **name_ends(tokenizer),
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 256,
        },
        audio_config=None,
        image_token_id=VOCAB_SIZE - 1, boi_token_id=ids(_BOI), eoi_token_id=ids(_EOI), video_token_id=ids("<|video|>"),
        boa_token_id=ids("<boa>"), eoa_token_index=ids("<eoa>"), audio_token_id=ids("<audio>"),
    )  # fmt: skip
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70),
        image_seq_length=70,
        chat_template=CHAT_TEMPLATE.replace(IMAGE_TOKEN, _SOFT),
    )
    return save_random(folder, lambda: Gemma4ForConditionalGeneration(config), processor, embedding=0.1)


def make_paligemma2(folder: Path) -> Path:
    """SigLIP before Gemma 2: everything before the answer sees everything before the answer; logits are soft-capped.

    Its processor adds 1,152 tokens for places and segments to the tokenizer's 300.
    """
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = tokenizer.pad_token
    image_processor: Any = SiglipImageProcessor(size={"height": 32, "width": 32})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=PALIGEMMA_TEMPLATE
    )
    text = {**_GEMMA, "vocab_size": len(tokenizer) + 12, "bos_token_id": tokenizer.bos_token_id}
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma2", **text, "layer_types": _LAYERS, "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **name_ends(tokenizer),
        },
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        image_token_index=VOCAB_SIZE - 1,
        projection_dim=128,
        hidden_size=128,
    )  # fmt: skip
    return save_random(folder, lambda: PaliGemmaForConditionalGeneration(config), processor, embedding=0.1)


PALIGEMMA_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- for item in message['content'] if item['type'] == 'image' %}<image>{% endfor -%}
<|endoftext|>
{%- for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor -%}
{{ '\\n' }}
{%- else -%}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif -%}
<|im_end|>
{%- endif -%}
{%- endfor -%}
"""


def _tokenizer(special: tuple[str, ...], named: Mapping[str, str] | None = None) -> Any:
    return make_tiny_tokenizer(
        (*SPECIAL_TOKENS[:-1], *special),
        image_token=_SOFT,
        named_tokens={"boi_token": _BOI, "eoi_token": _EOI, **(named or {})},
    )
