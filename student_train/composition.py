"""Composes a student: a vision tower, a decoder and a new projector become a standard LLaVA checkpoint.

This is how LLaVA-KD and LLaVA-MoD build theirs: SigLIP or CLIP, Qwen, and a two-layer GELU projector. Tokenizer,
chat template and image preprocessing are those of another checkpoint, most often the teacher's: a student must
have the teacher's tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.errors import ConfigError
from student_train.checkpoint import save_checkpoint
from student_train.config import CompositionSection
from student_train.huggingface import load_config, load_part, load_processor, transformers_module

_TOWERS = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}
_TOWERS |= {f"{name}_vision_model": kind for name, kind in _TOWERS.items()}
_WAIT_S = 1.0


def ensure_composed(section: CompositionSection, folder: str | Path, *, seed: int, is_first: bool) -> None:
    """Make the checkpoint at `folder` unless it is there; ranks but the first wait for it.

    Errors: ConfigError for parts that do not go together; StillhouseError for parts that cannot be read.
    """
    folder = Path(folder)
    if is_first and not folder.is_dir():
        save_checkpoint(compose(section, seed=seed), folder, section.processor)
    while not folder.is_dir():  # written whole, then renamed; the launcher ends this rank if the first one fails
        time.sleep(_WAIT_S)


def compose(section: CompositionSection, *, seed: int) -> Any:
    """The model: tower and decoder as they are, the projector drawn by `seed`. Errors: see `ensure_composed`."""
    transformers = transformers_module()
    processor = load_processor(section.processor)
    image_token_id = _image_token_id(processor, section.processor)
    tower = _tower(section.vision)
    decoder: Any = load_part(transformers.AutoModelForCausalLM, section.llm)
    real_size = max(processor.tokenizer.get_vocab().values()) + 1
    if decoder.config.vocab_size < real_size:  # new rows, drawn close to the mean of the others
        torch.manual_seed(0)
        decoder.resize_token_embeddings(real_size)
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=section.feature_layer,
        vision_feature_select_strategy=section.select,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=decoder.dtype)
    _copy(tower, model.model.vision_tower)
    _copy(decoder.get_decoder(), model.model.language_model)
    _copy(decoder.get_output_embeddings(), model.lm_head)
    model.tie_weights()
    model.generation_config = decoder.generation_config
    return model.eval()


def _tower(name: str) -> Any:
    config = load_config(name)
    kind = _TOWERS.get(config.model_type)
    if kind is None:
        raise ConfigError(f"compose.vision: {name} is a {config.model_type!r}, expected one of {', '.join(_TOWERS)}")
    config = getattr(config, "vision_config", config)
    return load_part(getattr(transformers_module(), kind), name, config=config)


def _image_token_id(processor: Any, name: str) -> int:
    token = getattr(processor, "image_token", None)
    known = processor.tokenizer.get_vocab() if hasattr(processor, "tokenizer") else {}
    if token not in known:
        raise ConfigError(
            f"compose.processor: {name} has no image token among its tokens; give the teacher's folder, or that "
            "of another LLaVA with the tokenizer that teacher and student share"
        )
    return known[token]


def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict(), strict=True)
