"""Writes checkpoints: Hugging Face folders that transformers loads and vLLM serves, replaced atomically.

Tensor names: transformers 5 saves a LLaVA's tower as `vision_tower.encoder…`, vLLM reads
`vision_tower.vision_model.encoder…`. Both read the names from before transformers 4.52:
`language_model.model.*`, `language_model.lm_head.*`, `multi_modal_projector.*` and
`vision_tower.vision_model.*`. Experts are saved one by one, as in public mixtures of experts. Towers other than CLIP's
and SigLIP's and other architectures keep the names of transformers' save_pretrained, which are those of the Hub.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from storage.backends.disk import explain_write_errors, format_bytes, measure_free_bytes
from storage.backends.folder import sync
from storage.errors import ConfigError, StillhouseError
from storage.images.settings import PIXELS_FILE, PixelSettings, write_pixel_settings
from student_train.models.huggingface import is_empty_expert
from student_train.models.sparse_upcycling import split_experts
from student_train.models.tower_features import CLASS_TOKENS
from student_train.template_arguments import write_template_arguments

_WEIGHTS = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_LEGACY = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.image_newline$", "image_newline"),
)
_OLD = "-old"  # suffix of a folder that is being replaced
_LEGACY_TYPES = ("llava", "llava_onevision")
PROCESSOR_FILES = (  # tokenizer, chat template with its arguments, image preprocessing
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", PIXELS_FILE,
)  # fmt: skip
_OWN_FILES = ("*.safetensors", _INDEX, "config.json", "generation_config.json", *PROCESSOR_FILES)


def save_checkpoint(
    model: Any,
    folder: str | Path,
    processor_source: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    pixels: PixelSettings | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    beside: Callable[[Path], object] | None = None,
    max_shard_bytes: int = 5 << 30,
) -> Path:
    """Save a model with the tokenizer and processor of `processor_source` as the checkpoint `folder`.

    The folder is either the old or the new one, never a mixture; other files in it are kept. `state_dict`: the
    model's whole weights, needed if its parameters are sharded. `pixels` and `template_arguments`: those it was
    trained with; None: those of the source. `beside` is called to write more files into the new folder.
    StillhouseError: no tokenizer in the source; WriteError: a full disk, a folder that cannot be written.
    """
    folder = Path(folder)
    weights: Mapping[str, Tensor] = model.state_dict() if state_dict is None else state_dict
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with explain_write_errors(folder, needed_bytes=num_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(6)}")
        new.mkdir()
        write_settings = partial(_write_settings, pixels, template_arguments, beside)
        _fill_and_swap(model, folder, new, processor_source, weights, write_settings, max_shard_bytes)
    return folder


def _fill_and_swap(
    model: Any,
    folder: Path,
    new: Path,
    processor_source: str | Path,
    weights: Mapping[str, Tensor],
    write_settings: Callable[[Path], object],
    max_shard_bytes: int,
) -> None:
    """Write a checkpoint into the empty folder `new` and replace `folder` by it; delete `new` on failure."""
    try:
        if not _has_legacy_names(model.config):
            model.save_pretrained(new, state_dict=dict(weights), max_shard_size=max_shard_bytes)
            _write_config(model, new)
        else:
            _write_config(model, new)
            _write_weights(model, weights, new, max_shard_bytes)
        copy_processor(processor_source, new)
        write_settings(new)
        _replace_folder(folder, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write_settings(
    pixels: PixelSettings | None,
    template_arguments: Mapping[str, Any] | None,
    beside: Callable[[Path], object] | None,
    folder: Path,
) -> None:
    if pixels is not None:
        write_pixel_settings(pixels, folder)
    if template_arguments is not None:
        write_template_arguments(template_arguments, folder)
    if beside is not None:
        beside(folder)


def check_free_space(num_bytes: int, folder: Path) -> None:
    """Check that a checkpoint of that size, written beside the old one, fits on the disk. Errors: ConfigError."""
    free = measure_free_bytes(folder)
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"{folder}: its disk has {format_bytes(free)} free, but the checkpoint at the end of the stage needs "
            f"{format_bytes(num_bytes)}; free space there, or give another output"
        )


def recover_checkpoint(folder: Path) -> None:
    """Recover from a `save_checkpoint` that was killed: restore the old folder, delete a partial new one."""
    beside = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"))
    for old in beside:
        if old.name.endswith(_OLD) and not folder.exists():
            old.rename(folder)
    for left in beside:
        shutil.rmtree(left, ignore_errors=True)


def copy_processor(source: str | Path, folder: Path) -> None:
    """Copy tokenizer, chat template and image preprocessing. StillhouseError: the source has no tokenizer."""
    root = _locate_folder(source)
    files = sorted({path for pattern in PROCESSOR_FILES for path in root.glob(pattern) if path.is_file()})
    if not any(path.name.startswith("tokenizer") or path.suffix == ".model" for path in files):
        raise StillhouseError(f"{source}: has no tokenizer, which a checkpoint needs; give a complete checkpoint")
    for path in files:
        target = folder / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def to_legacy_name(name: str) -> str:
    """Return a parameter's name in the file; see this module's header."""
    for pattern, replacement in _LEGACY:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def _has_legacy_names(config: Any) -> bool:
    return config.model_type in _LEGACY_TYPES and config.vision_config.model_type in CLASS_TOKENS


def _write_config(model: nn.Module, folder: Path) -> None:
    import copy

    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _write_weights(model: Any, state_dict: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {
        to_legacy_name(name): tensor.detach().to("cpu").contiguous()
        for name, tensor in split_experts(state_dict).items()
        if name not in tied and not is_empty_expert(name, model.config)
    }
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=_WEIGHTS, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_folder(folder: Path, new: Path) -> None:
    """Replace `folder` by `new`; keep files of the old one that are not part of a checkpoint."""
    if folder.exists():
        stale = {path.name for pattern in _OWN_FILES for path in folder.glob(pattern)}
        for path in folder.iterdir():
            if path.name not in stale and not (new / path.name).exists():
                _link_or_copy(path, new / path.name)
    for path in new.rglob("*"):
        if path.is_file():
            sync(path)
    sync(new)
    old = new.with_name(f"{new.name}{_OLD}")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    source = Path(source)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
        return
    try:
        os.link(source, target)  # the same file: open logs keep writing to it
    except OSError:
        shutil.copy2(source, target)


def _locate_folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=list(PROCESSOR_FILES)))
