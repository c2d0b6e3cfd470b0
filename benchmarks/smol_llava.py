"""A LLaVA whose decoder is SmolLM2-135M, and illustrated questions for it: real weights, real vocabulary.

The vision tower (a small SigLIP) and the projector are random: what they cost counts here, what they see does not.
The questions are headings of Python's documentation, the answers what stands below them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.text_rows import model_and_tokenizer, topics
from student_train.models.huggingface import import_transformers

IMAGE_TOKEN = "<image>"
PATCH_SIZE = 16  # pixels a side, of a visual token
_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def save_smol_llava(folder: Path, *, image_size: int = 64) -> None:
    """Write the checkpoint with its processor, unless it is there."""
    _save(folder, *model_and_tokenizer(), image_size=image_size)


def save_small_llava(
    folder: Path, *, logit_std: float, hidden: int = 64, layers: int = 2, image_size: int = 64
) -> None:
    """The same vocabulary behind a random decoder so small that its prefill hardly counts, and a random head.

    The normed states have a size of sqrt(hidden), so a row's logits are Gaussian with about `logit_std`. Of 49,153
    tokens 6.25 leaves 2.0 nats, as natural rows of SmolLM2 have (512 rows: 1.9); 0.16 (transformers' own
    initialisation) leaves 10.8, nearly all, as no trained teacher does.
    """
    transformers = import_transformers()
    _, tokenizer = model_and_tokenizer()
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = transformers.LlamaForCausalLM(text)
    _save(folder, decoder, tokenizer, image_size=image_size, head_std=logit_std / hidden**0.5)


def write_questions(
    folder: Path, *, num_samples: int, num_images: int, answer_tokens: int, tokenizer: Any, image_size: int = 64
) -> Path:
    """A LLaVA-format JSONL file of questions, several to an image, with answers of so many tokens; returns it."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        pixels = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{number:05d}.png")
    answers = _answers(tokenizer, answer_tokens, num_samples)
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number, (heading, answer) in enumerate(answers):
            turns = [
                {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat does Python's documentation say of {heading}?"},
                {"from": "gpt", "value": answer},
            ]
            image = f"images/{number % num_images:05d}.png"
            lines.write(json.dumps({"id": f"{number:06d}", "image": image, "conversations": turns}) + "\n")
    return path


def _answers(tokenizer: Any, length: int, count: int) -> list[tuple[str, str]]:
    pieces = []
    for heading, text in topics():
        ids = tokenizer(text)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)
        texts = (tokenizer.decode(ids[start : start + length]) for start in starts)
        pieces += [(heading, text) for text in texts if not text[0].isspace()]  # which the template's would join
    order = np.random.default_rng(0).permutation(len(pieces))
    return [pieces[order[number % len(pieces)]] for number in range(count)]


def _save(folder: Path, decoder: Any, tokenizer: Any, *, image_size: int, head_std: float | None = None) -> None:
    """`head_std` None: the head is the decoder's embedding."""
    if (folder / "processor_config.json").exists():  # written last
        return
    transformers = import_transformers()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = _TEMPLATE
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    described = {name: value for name, value in decoder.config.to_dict().items() if name != "quantization_config"}
    described["tie_word_embeddings"] = head_std is None
    vision = transformers.SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH_SIZE,
    )
    vision.vision_use_head = False
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=type(decoder.config).from_dict(described),  # the weights are no GGUF's any more
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=head_std is None,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    with torch.no_grad():  # features as large as embeddings are, so that the image is seen
        for parameter in model.model.multi_modal_projector.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
        if head_std is not None:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * head_std)
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.SiglipImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
    )
    processor.save_pretrained(folder)
