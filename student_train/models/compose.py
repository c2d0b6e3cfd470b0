"""Composes a student: a vision tower, a decoder and a new projector become a standard LLaVA checkpoint.

LLaVA-KD and LLaVA-MoD build theirs in this way: SigLIP or CLIP, Qwen, and a two-layer GELU projector. Tokenizer,
chat template and image preprocessing come from another checkpoint, usually the teacher's, since a student needs the
teacher's tokens.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.backends.folder import write_json
from storage.backends.lock import hold_lock
from storage.errors import ConfigError, StillhouseError
from storage.field_changes import describe_changes
from student_train.config import CompositionSection
from student_train.models.checkpoint import recover_checkpoint, save_checkpoint
from student_train.models.checkpoint_contents import describe_composition
from student_train.models.huggingface import import_transformers, load_config, load_part, load_processor

RECORD = "composition.json"  # inputs of a composed checkpoint, inside it
_TOWERS = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}
_TOWERS |= {f"{name}_vision_model": kind for name, kind in _TOWERS.items()}
_log = logging.getLogger(__name__)


def ensure_composed(
    section: CompositionSection,
    folder: str | Path,
    *,
    seed: int,
    replaces: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Compose the checkpoint at `folder`, unless it exists and was made from the same parts. Call it on one rank.

    `replaces`: whether to replace a checkpoint that was composed from other parts. `check` is called with the new
    checkpoint before it is moved to `folder`; if it raises, nothing is left. Errors: ConfigError for parts that do not
    fit, and for a checkpoint that was composed from other parts; StillhouseError for parts that cannot be read.
    """
    folder = Path(folder)
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with hold_lock(
            folder.with_name(f"{folder.name}~lock"), f"the composed checkpoint {folder}", patience_s=math.inf
        ):
            recover_checkpoint(folder)
            inputs = describe_composition(section, seed=seed)
            if not _is_composed(folder, inputs, replaces=replaces):
                _compose_into(folder, section, inputs, seed=seed, check=check)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not empty: another process writes there
                parent.rmdir()
        raise


def list_parts(section: CompositionSection) -> tuple[str, ...]:
    """Return the checkpoints that a composition takes its parts from."""
    return section.vision, section.llm, section.processor


def check_composition(section: CompositionSection, place: str) -> None:
    """Check that a composition's parts exist and fit, without reading weights. `place`: prefix of messages.

    Errors: ConfigError for parts that do not fit or cannot be read.
    """
    try:
        _find_tower_class(section.vision)
        config = load_config(section.llm)
        if type(config) not in import_transformers().MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(f"compose.llm: {section.llm} is a {config.model_type!r}, expected a causal decoder")
        _find_image_token_id(load_processor(section.processor), section.processor)
    except StillhouseError as error:
        raise ConfigError(f"{place}: {error}") from error


def _is_composed(folder: Path, inputs: dict[str, Any], *, replaces: bool) -> bool:
    """Return whether the checkpoint exists and can be kept. ConfigError if it was composed from other inputs."""
    if not folder.is_dir():
        return False
    try:
        composed = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _log.warning("%s has no %s, so its inputs are unknown; it is used unchanged", folder, RECORD)
        return True
    changes = describe_changes(composed, inputs, "compose")
    if changes and not replaces:
        raise ConfigError(
            f"{folder} was composed from other inputs; give init another folder, or undo the change, or compose it "
            "again and train with --again (a finished stage) or --restart (an unfinished one):"
            + "".join(f"\n  {change}" for change in changes)
        )
    if changes:
        _log.warning("%s is composed again:%s", folder, "".join(f"\n  {change}" for change in changes))
    return not changes


def _compose_into(
    folder: Path,
    section: CompositionSection,
    inputs: dict[str, Any],
    *,
    seed: int,
    check: Callable[[Path], object] | None,
) -> None:
    def finish(new: Path) -> None:
        write_json(new / RECORD, inputs)
        if check is None:
            return
        try:
            check(new)
        except StillhouseError as error:  # its message names the temporary folder
            raise type(error)(str(error).replace(str(new), str(folder))) from error

    save_checkpoint(compose(section, seed=seed), folder, section.processor, beside=finish)


def compose(section: CompositionSection, *, seed: int) -> Any:
    """Compose the model: tower and decoder unchanged, the projector drawn by `seed`. Errors as `ensure_composed`."""
    transformers = import_transformers()
    processor = load_processor(section.processor)
    image_token_id = _find_image_token_id(processor, section.processor)
    tower = _load_tower(section.vision)
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
    _copy_weights(tower, model.model.vision_tower)
    _copy_weights(decoder.get_decoder(), model.model.language_model)
    _copy_weights(decoder.get_output_embeddings(), model.lm_head)
    model.tie_weights()
    model.generation_config = decoder.generation_config
    return model.eval()


def _load_tower(name: str) -> Any:
    config, kind = _find_tower_class(name)
    config = getattr(config, "vision_config", config)
    return load_part(getattr(import_transformers(), kind), name, config=config)


def _find_tower_class(name: str) -> tuple[Any, str]:
    """Return a vision part's configuration and the name of its tower's class."""
    config = load_config(name)
    kind = _TOWERS.get(config.model_type)
    if kind is None:
        raise ConfigError(f"compose.vision: {name} is a {config.model_type!r}, expected one of {', '.join(_TOWERS)}")
    return config, kind


def _find_image_token_id(processor: Any, name: str) -> int:
    token = getattr(processor, "image_token", None)
    known = processor.tokenizer.get_vocab() if hasattr(processor, "tokenizer") else {}
    if token not in known:
        raise ConfigError(
            f"compose.processor: {name} has no image token in its vocabulary; give the teacher's folder, or that "
            "of another LLaVA with the tokenizer that teacher and student share"
        )
    return known[token]


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict(), strict=True)
