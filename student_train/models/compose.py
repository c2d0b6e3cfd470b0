"""Composes a student: a vision tower, a decoder and a new projector become a checkpoint of a class of transformers.

LLaVA-KD and LLaVA-MoD build theirs in this way: SigLIP or CLIP, Qwen, and a two-layer GELU projector. A tower with
hidden states that are sequences makes a LLaVA; one with a map of features, such as a convolutional network of timm,
makes a FastVLM. Tokenizer, chat template and image preprocessing come from another checkpoint, usually the teacher's,
since a student needs the teacher's tokens; or a processor is made of the parts and a template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from storage.errors import ConfigError, StillhouseError
from student_train.config import CompositionSection
from student_train.data.image_inputs import ImageProcessorAdapter
from student_train.models.checkpoint_contents import describe_composition, read_template
from student_train.models.huggingface import (
    check_timm,
    find_tower_class,
    import_transformers,
    load_config,
    load_image_processor,
    load_part,
    load_processor,
    load_tokenizer,
)
from student_train.models.made_checkpoints import Making, ensure_made
from student_train.models.made_processors import IMAGE_TOKEN, make_processor
from student_train.models.tower_features import (
    CLASS_TOKENS,
    TowerFeatures,
    measure_tower,
    read_image_size,
)

_WHOLE = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}  # towers of whole models
_TOWERS = {**_WHOLE, **{f"{name}_vision_model": kind for name, kind in _WHOLE.items()}}
_PROBED_PICTURE = (224, 224)  # of any size: a processor that fits resizes to one


@dataclass(frozen=True)
class Tower:
    """A vision part's configuration, the class of its tower, and what that gives the projector."""

    config: Any  # of the tower
    kind: str  # a class of transformers
    features: TowerFeatures
    layer: int  # whose output the projector reads
    num_tokens: int  # visual tokens of an image


def ensure_composed(
    section: CompositionSection,
    folder: str | Path,
    *,
    seed: int,
    replaces: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Compose the checkpoint at `folder`, unless it exists and was made from the same parts. Call it on one rank.

    `replaces` and `check` as for `ensure_made`. Errors: ConfigError for parts that do not fit, and for a checkpoint
    that was composed from other parts; StillhouseError for parts that cannot be read.
    """
    making = Making(
        "compose",
        describe=lambda: describe_composition(section, seed=seed),
        build=lambda: compose(section, seed=seed),
        processor=section.processor or (lambda made: _open_processor(section).save_pretrained(made)),
    )
    ensure_made(making, folder, replaces=replaces, check=check)


def list_parts(section: CompositionSection) -> tuple[str, ...]:
    """Return the checkpoints that a composition takes its parts from."""
    return tuple(part for part in (section.vision, section.llm, section.processor) if part is not None)


def check_composition(section: CompositionSection, place: str) -> None:
    """Check that a composition's parts exist and fit, without reading weights. `place`: prefix of messages.

    Errors: ConfigError for parts that do not fit or cannot be read.
    """
    try:
        _find_tower_class(section.vision)
        config = load_config(section.llm)
        if type(config) not in import_transformers().MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(f"compose.llm: {section.llm} is a {config.model_type!r}, expected a causal decoder")
        processor = _open_processor(section)
        _check_tower(section, processor, _find_image_token_id(processor, section))
    except StillhouseError as error:
        raise ConfigError(f"{place}: {error}") from error


def compose(section: CompositionSection, *, seed: int) -> Any:
    """Compose the model: tower and decoder unchanged, the projector drawn by `seed`. Errors as `ensure_composed`."""
    transformers = import_transformers()
    processor = _open_processor(section)
    image_token_id = _find_image_token_id(processor, section)
    found = _check_tower(section, processor, image_token_id)
    tower: Any = load_part(getattr(transformers, found.kind), section.vision, config=found.config)
    decoder: Any = load_part(transformers.AutoModelForCausalLM, section.llm)
    real_size = max(processor.tokenizer.get_vocab().values()) + 1
    if decoder.config.vocab_size < real_size:  # new rows, drawn close to the mean of the others
        torch.manual_seed(0)
        decoder.resize_token_embeddings(real_size)
    torch.manual_seed(seed)
    is_map = found.features.kind == "map"
    if is_map:  # what FastVLM reads of a tower's config, and the pooled features that it does not read
        tower.config.hidden_size = found.features.width
        tower.config.do_pooling = False
    config = (transformers.FastVlmConfig if is_map else transformers.LlavaConfig)(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        image_seq_length=found.num_tokens,
        projector_hidden_act="gelu",
        vision_feature_layer=found.layer,
        vision_feature_select_strategy=section.select,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=decoder.dtype)
    _copy_weights(tower, model.model.vision_tower)
    _copy_weights(decoder.get_decoder(), model.model.language_model)
    _copy_weights(decoder.get_output_embeddings(), model.lm_head)
    model.tie_weights()
    model.generation_config = decoder.generation_config
    if section.template is not None:
        _add_stop_token(model.generation_config, processor.tokenizer.eos_token_id)
    return model.eval()


def _open_processor(section: CompositionSection) -> Any:
    """Load the composition's processor, or make it of the parts and a template. Errors: ConfigError."""
    if section.processor is not None:
        return load_processor(section.processor)
    image_processor = load_image_processor(section.vision)
    height, width = read_image_size(image_processor)
    if height is None or width is None:
        raise ConfigError(
            f"compose.vision: the image processor of {section.vision} names no size of its pixels, so no processor can "
            "be made; give compose.processor"
        )
    config, _ = _find_tower_class(section.vision)
    layer = -2 if section.feature_layer is None else section.feature_layer
    features = measure_tower(config, (height, width), layer=layer, place=f"compose.vision: {section.vision}")
    return make_processor(
        image_processor,
        load_tokenizer(section.llm),
        features,
        template=read_template(section),
        select=section.select,
        pad_to_square=section.pad_to_square,
        place=f"compose.vision: {section.vision}",
    )


def _add_stop_token(generation: Any, stop: int) -> None:
    """Let generation stop at the token that the template writes after an answer."""
    known = generation.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if stop not in known:
        generation.eos_token_id = [stop, *known]


def _check_tower(section: CompositionSection, processor: Any, image_token_id: int) -> Tower:
    """Find the vision part's tower and check that it fits the section's fields and the processor, without weights."""
    config, kind = _find_tower_class(section.vision)
    place = f"compose.vision: {section.vision}"
    of_images = f"the image processor of {section.processor or section.vision}"
    field = "compose.vision" if section.processor is None else "compose.processor"
    height, width = read_image_size(processor.image_processor)
    if height is None or width is None:
        raise ConfigError(
            f"{field}: {of_images} names no size of its pixels, so the "
            "number of visual tokens is not known; give one that resizes every image to one size"
        )
    expected = getattr(config, "image_size", None)
    if config.model_type in CLASS_TOKENS and (height, width) != (expected, expected):
        raise ConfigError(
            f"{place} expects {expected} x {expected} pixels, but {of_images} makes {height} x {width}; give a "
            "processor of the tower's size"
        )
    if height != width:
        raise ConfigError(
            f"{field}: {of_images} makes {height} x {width} pixels, expected a square, since the visual losses compare "
            "square grids; give one that does"
        )
    layer = -2 if section.feature_layer is None else section.feature_layer
    features = measure_tower(config, (height, width), layer=layer, place=place)
    if features.kind == "map":
        layer = -1
        _check_map_fields(section, place)
    elif section.select == "default" and not features.num_prefix and not _drops_first(section, processor):
        raise ConfigError(
            f"compose.select is default, which drops the first position, but {section.vision} has no known "
            "class token there; set select: full"
        )
    num_tokens = features.num_positions - (1 if section.select == "default" else 0)
    _check_token_count(section, processor, image_token_id, num_tokens, is_map=features.kind == "map")
    return Tower(config, kind, features, layer, num_tokens)


def _drops_first(section: CompositionSection, processor: Any) -> bool:
    """Return whether the given processor's model drops its tower's first position too, whatever that is.

    TinyLLaVA's models drop the first patch of SigLIP; a student whose visual tokens are compared does the same.
    """
    return bool(section.processor) and getattr(processor, "vision_feature_select_strategy", None) == "default"


def _check_map_fields(section: CompositionSection, place: str) -> None:
    """ConfigError for what a FastVLM cannot do."""
    if section.feature_layer not in (None, -1):
        raise ConfigError(
            f"compose.feature_layer is {section.feature_layer}, but the features of {section.vision} are a map, of "
            "which a FastVLM reads the last one: remove feature_layer, or set it to -1"
        )
    if section.select != "full":
        raise ConfigError(
            f"compose.select is {section.select}, but the features of {section.vision} are a map without a class "
            "token; set select: full"
        )


def _check_token_count(
    section: CompositionSection, processor: Any, image_token_id: int, num_features: int, *, is_map: bool
) -> None:
    """ConfigError if the processor writes another number of image tokens than the tower makes."""
    if getattr(processor, "patch_size", 0) is None:
        if not is_map:
            return  # an older LLaVA's, which leaves that to the model
        raise ConfigError(
            f"compose.processor: {section.processor} has patch_size null, so it cannot write the {num_features} image "
            f"tokens of {section.vision}; set patch_size in its processor_config.json"
        )
    inputs = ImageProcessorAdapter(processor, image_token_id=image_token_id)
    num_tokens = int(np.count_nonzero(inputs.expand_image(_PROBED_PICTURE) == image_token_id))
    if num_tokens != num_features:
        raise ConfigError(
            f"compose.processor: {section.processor or 'the made one'} makes {num_tokens} tokens of an image, but "
            f"{section.vision} with select: {section.select} has {num_features} features of one; make patch_size, "
            "num_additional_image_tokens and vision_feature_select_strategy in its processor_config.json fit the tower"
        )


def _find_tower_class(name: str) -> tuple[Any, str]:
    """Return the configuration of a vision part's tower, and the name of the tower's class."""
    config = load_config(name)
    kind = _TOWERS.get(config.model_type)
    if kind is not None:
        return getattr(config, "vision_config", config), kind
    check_timm(config, f"compose.vision: {name}")
    model = None if hasattr(config, "vision_config") else find_tower_class(config)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ConfigError(
            f"compose.vision: {name} is a {config.model_type!r}, expected a vision tower that transformers' AutoModel "
            "loads, or a whole SigLIP or CLIP"
        )
    return config, "AutoModel"


def _find_image_token_id(processor: Any, section: CompositionSection) -> int:
    if section.processor is None:
        return processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    token = getattr(processor, "image_token", None)
    known = processor.tokenizer.get_vocab() if hasattr(processor, "tokenizer") else {}
    if token not in known:
        raise ConfigError(
            f"compose.processor: {section.processor} has no image token in its vocabulary; give the teacher's folder, "
            "or that of another LLaVA with the tokenizer that teacher and student share, or a template"
        )
    return known[token]


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict(), strict=True)
