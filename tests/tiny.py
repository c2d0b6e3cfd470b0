"""Tiny models and data sets for tests: a random LLaVA (SigLIP tower, Qwen2 decoder) and LLaVA-format JSONL.

Where torch is a `+cpu` build and torchvision comes from PyPI, transformers cannot import a model class
before `storage.processes.torchvision_shim.import_torch_companions()` ran; the builders here call it themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

IMAGE_TOKEN = "<image>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN, IMAGE_TOKEN)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' %}<image>
{% else %}{{ item['text'] }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
QUESTIONS = ("what colour is the left half?", "what colour is the right half?", "describe the image.")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def make_tiny_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    *,
    image_token: str | None = IMAGE_TOKEN,
    template: str = CHAT_TEMPLATE,
    named_tokens: Mapping[str, str] | None = None,
) -> Any:
    """A byte-level BPE of 300 tokens, special tokens last and their image token the very last.

    `named_tokens`: further attributes of the tokenizer, such as `boi_token`, and the special token of each.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = [*QUESTIONS, *COLOURS, "user", "assistant", "system", "the left half is red and the right blue"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 - len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text * 4, trainer)
    bpe.add_special_tokens(list(special_tokens))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        extra_special_tokens={
            **({} if image_token is None else {"image_token": image_token}),
            **(named_tokens or {}),
        },
    )
    tokenizer.chat_template = template
    return tokenizer


def make_tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    head_dim: Literal[32, 64] = 32,  # what vLLM's CPU attention takes
    num_layers: int = 2,
    vision_size: int = 64,
    image_size: int = 32,  # pixels; patches of 8, so 16 visual tokens
    tied: bool = False,
    padded_vocab: int = 320,  # rows of the head; the tokenizer has 300 tokens
    scale: float = 0.3,  # standard deviation of the head and the projector, half of it in the decoder's layers
) -> Path:
    """Save a random LLaVA with its processor as a Hugging Face checkpoint; returns `folder`."""
    from storage.processes import torchvision_shim

    torchvision_shim.import_torch_companions()
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    tokenizer = make_tiny_tokenizer()
    num_heads = hidden_size // head_dim
    text = Qwen2Config(
        vocab_size=padded_vocab,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=vision_size,
        intermediate_size=2 * vision_size,
        num_hidden_layers=2,
        num_attention_heads=vision_size // 32,
        image_size=image_size,
        patch_size=8,
    )
    vision.vision_use_head = False
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name and parameter.dim() == 2:
                parameter.normal_(0, scale)
            elif "language_model.layers" in name and parameter.dim() == 2:
                parameter.normal_(0, scale / 2)  # or attention moves nothing, and the image is not seen
        torch.nn.init.normal_(model.lm_head.weight, 0, scale)
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    images = SiglipImageProcessor(size=size, crop_size=size, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def make_tiny_dataset(
    folder: Path,
    *,
    num_samples: int = 12,
    num_images: int = 6,  # sample i shows image i % num_images
    turns: int = 1,
    image_size: int = 32,
    splits: Sequence[str] = ("train",),  # one JSONL file each, ids prefixed by the split
    seed: int = 0,
) -> dict[str, Path]:
    """Write PNGs of two coloured halves and one LLaVA JSONL file a split; returns the files by split."""
    draw = np.random.default_rng(seed)
    names = list(COLOURS)
    files: dict[str, Path] = {}
    for split in splits:
        halves = [(str(draw.choice(names)), str(draw.choice(names))) for _ in range(num_images)]
        for number, (left, right) in enumerate(halves):
            pixels = np.empty((image_size, image_size, 3), dtype=np.uint8)
            pixels[:, : image_size // 2] = COLOURS[left]
            pixels[:, image_size // 2 :] = COLOURS[right]
            pixels[number % image_size] = draw.integers(0, 255, (image_size, 3))  # no two images alike
            path = folder / "images" / f"{split}-{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        files[split] = folder / f"{split}.jsonl"
        with files[split].open("w", encoding="utf-8") as lines:
            for index in range(num_samples):
                number = index % num_images
                left, right = halves[number]
                answers = (left, right, f"the left half is {left} and the right half is {right}")
                conversation = []
                for turn in range(turns):
                    asked = (index // num_images + turn) % len(QUESTIONS)
                    marker = f"{IMAGE_TOKEN}\n" if turn == 0 else ""
                    conversation.append({"from": "human", "value": marker + QUESTIONS[asked]})
                    conversation.append({"from": "gpt", "value": answers[asked]})
                sample = {
                    "id": f"{split}-{index:04d}",
                    "image": f"images/{split}-{number:03d}.png",
                    "category": "caption" if turns == 1 and (index // num_images) % 3 == 2 else "colour",
                    "conversations": conversation,
                }
                lines.write(json.dumps(sample) + "\n")
    return files
