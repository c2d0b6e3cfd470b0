"""The tokenizer, chat template and untrained LLaVA models of the digits experiment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.digits.tower import FEATURE_LAYER, IMAGE_PIXELS, PATCH_PIXELS
from student_train.models.huggingface import import_transformers

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT_TEMPLATE = (  # ChatML, as Qwen2's; images stand where the conversation has them
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class DecoderSize:
    """A Qwen2 decoder; heads are 32 wide, the least that vLLM's attention takes on a CPU."""

    hidden: int
    layers: int


TEACHER = DecoderSize(hidden=192, layers=4)
STUDENT = DecoderSize(hidden=96, layers=2)


def make_processor(texts: Iterable[str]) -> LlavaProcessor:
    """A LLaVA processor with a byte-level BPE tokenizer trained on `texts`."""
    transformers = import_transformers()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    images = transformers.SiglipImageProcessorPil(size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS})
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def make_llava(
    tower: SiglipVisionModel, processor: LlavaProcessor, size: DecoderSize, *, seed: int
) -> LlavaForConditionalGeneration:
    """A LLaVA with this tower, and a projector and a Qwen2 decoder of random weights."""
    transformers = import_transformers()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    text = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()
