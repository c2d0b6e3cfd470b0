"""What a format's reader returns, from which the target is written, and steps that several readers share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.conversion.chat_templates import ChatTemplate
from stillhouse.conversion.processor_files import Vision
from stillhouse.conversion.source_tensors import WeightFile
from stillhouse.conversion.tensor_plan import MapName, Piece
from storage.errors import ConfigError
from student_train.models.huggingface import import_transformers


@dataclass(frozen=True)
class Options:
    """What the command line gives besides source and target."""

    vision_tower: Path | None = None  # folder of the tower, where the source names it only
    base: Path | None = None  # folder of the decoder, for a lone projector
    tokenizer: Path | None = None
    template: str | None = None  # a name of chat_templates.TEMPLATES
    dtype: str = "float32"  # of the weights of a GGUF file


@dataclass(frozen=True)
class Conversion:
    """A LLaVA of transformers, and where its parts come from."""

    format: str
    text_config: Any
    vision: Vision
    files: tuple[WeightFile, ...]
    map_name: MapName
    tokenizer: Any  # with the image token
    template: ChatTemplate
    notes: tuple[str, ...] = ()  # what a user must know: choices that were made, and what could not be mapped


def make_llava_config(conversion: Conversion) -> Any:
    """Return the target's configuration. The decoder has a row for every token, so it may grow by the image token."""
    text, tokenizer, vision = conversion.text_config, conversion.tokenizer, conversion.vision
    text.vocab_size = max(text.vocab_size, count_rows(tokenizer))
    text.eos_token_id = tokenizer.convert_tokens_to_ids(conversion.template.end_token)
    config = import_transformers().LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=vision.num_tokens,
        projector_hidden_act="gelu",  # exact, as torch.nn.GELU()
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy=vision.strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def count_rows(tokenizer: Any) -> int:
    """Return the number of rows that a tokenizer needs: its highest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def rename(name: str, rules: Sequence[tuple[str, str]]) -> list[Piece] | None:
    """Return the tensor's new name by the first rule whose pattern matches the whole name; None if none does."""
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return [Piece(re.sub(pattern, replacement, name))]
    return None


def get_required(config: Mapping[str, Any], key: str, place: Path) -> Any:
    """Return a key's value. ConfigError if it is missing."""
    if config.get(key) is None:
        raise ConfigError(f"{place}: has no {key}, which this format needs; give the config.json of the checkpoint")
    return config[key]


def read_layer(value: Any, *, place: str) -> int:
    """Return the number of a tower's layer. ConfigError for something else."""
    if not isinstance(value, int):
        raise ConfigError(f"{place} is {value!r}, expected the number of a layer, such as -2")
    return value
