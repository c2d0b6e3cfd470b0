"""Students: LLaVA-type checkpoints, checked against a cache before weights are read, then frozen in part."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from storage.errors import ConfigError, IdentityError, StillhouseError
from storage.identity import Identity, real_vocab_size, tokenizer_fingerprint
from student_train.batch import Grid
from student_train.config import Module, Precision
from student_train.huggingface import load_config, load_image_processor, load_tokenizer, load_weights
from student_train.images import FeatureStore
from student_train.student import Student

MODEL_TYPES = ("llava",)
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # positions before the patches
PARTS: dict[Module, tuple[str, ...]] = {  # submodules of LlavaForConditionalGeneration
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "llm": ("model.language_model", "lm_head"),
}
FLASH_PACKAGES = ("flash_attn", "flash_attn_interface")  # versions 2 and 3
_LAYERS = "model.language_model.layers"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A student's description, its weights not read yet."""

    folder: str  # or hub id
    config: Any
    tokenizer: Any
    image_processor: Any
    grid: Grid


def is_hub_id(name: str | Path) -> bool:
    """Whether a name that is no folder may be one on the hub: owner/name."""
    return not Path(name).is_absolute() and len(Path(name).parts) == 2


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Everything but the weights. Errors: StillhouseError; ConfigError for another architecture."""
    if not Path(folder).is_dir() and not is_hub_id(folder):
        raise ConfigError(f"{folder}: there is no such folder, and a hub id is owner/name")
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder}: no checkpoint is in this folder (config.json is missing)")
    config = load_config(folder)
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{folder}: model_type is {config.model_type!r}, expected {' or '.join(MODEL_TYPES)}: a student "
            "is a vision tower, a projector and a causal decoder as LLaVA has them"
        )
    tokenizer = load_tokenizer(folder)
    image_processor = load_image_processor(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    grid = Grid(
        image_token_id=config.image_token_id,
        tokens_per_image=visual_tokens_per_image(config, image_processor, folder),
        pad_token_id=0 if pad is None else pad,
        max_length=config.text_config.max_position_embeddings,
    )
    return Checkpoint(str(folder), config, tokenizer, image_processor, grid)


def visual_tokens_per_image(config: Any, image_processor: Any, folder: str | Path) -> int:
    """Positions that an image takes in the decoder: patches and class token, as the config selects them."""
    vision = config.vision_config
    if vision.model_type not in CLASS_TOKENS:
        raise ConfigError(
            f"{folder}: the vision tower is a {vision.model_type!r}, expected one of {sorted(CLASS_TOKENS)}"
        )
    size = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", 0) else None
    size = size or image_processor.size
    pixels = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    if pixels != [vision.image_size, vision.image_size]:
        raise StillhouseError(
            f"{folder}: the image processor makes {pixels[0]} x {pixels[1]} pixels, the vision tower takes "
            f"{vision.image_size} x {vision.image_size}; make preprocessor_config.json and config.json agree"
        )
    num_patches = (vision.image_size // vision.patch_size) ** 2
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return num_patches + CLASS_TOKENS[vision.model_type] - dropped


def check_fit(checkpoint: Checkpoint, identity: Identity) -> None:
    """IdentityError naming each field in which a student does not fit a cache, both values and what to do."""
    vocabulary = checkpoint.tokenizer.get_vocab()
    rows = checkpoint.config.text_config.vocab_size
    problems = []
    for name, ours, theirs in (
        ("tokenizer_fingerprint", tokenizer_fingerprint(vocabulary), identity.tokenizer_fingerprint),
        ("vocab_size", real_vocab_size(vocabulary), identity.vocab_size),
        ("image_token_id", checkpoint.grid.image_token_id, identity.image_token_id),
    ):
        if ours != theirs:
            problems.append(f"{name}: the cache has {theirs}, {checkpoint.folder} has {ours}")
    if rows < identity.vocab_size:
        problems.append(f"vocab_size: the cache has {identity.vocab_size}, the head of {checkpoint.folder} {rows} rows")
    if problems:
        raise IdentityError(
            "this student does not fit this cache; give it the teacher's tokenizer, or dump with a teacher "
            "of its own family:" + "".join(f"\n  {problem}" for problem in problems)
        )


def load_student(checkpoint: Checkpoint, *, precision: Precision, device: torch.device) -> Any:
    """The model with its weights on a device, in eval mode. StillhouseError as `load_weights`."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    installed = {package for package in FLASH_PACKAGES if find_spec(package) is not None}
    attention = attention_implementation(precision, capability, installed)
    model: Any = load_weights(checkpoint.folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()


def attention_implementation(
    precision: Precision, capability: tuple[int, int] | None, installed: Collection[str]
) -> Literal["flash_attention_3", "flash_attention_2", "sdpa"]:
    """The fastest one that transformers can use; `capability` is of the GPU, None without one.

    FlashAttention computes in 16 bits: version 3 on Hopper, version 2 from Ampere on. PyTorch's SDPA does the rest.
    """
    if precision == "fp32" or capability is None:
        return "sdpa"
    if capability[0] == 9 and "flash_attn_interface" in installed:
        return "flash_attention_3"
    return "flash_attention_2" if capability >= (8, 0) and "flash_attn" in installed else "sdpa"


def load_for_inference(checkpoint: Checkpoint, *, vocab_size: int, features: FeatureStore | None = None) -> Student:
    """A frozen student on the GPU in bfloat16 if there is one, else on the CPU in float32."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_student(checkpoint, precision="bf16" if on_gpu else "fp32", device=device)
    model.requires_grad_(False)
    return Student(model, vocab_size=vocab_size, image_token_id=checkpoint.grid.image_token_id, features=features)


def module_of(name: str) -> tuple[Module, ...]:
    """The modules that hold a parameter of a LLaVA, the narrowest first."""
    parts: list[Module] = [
        part for part, prefixes in PARTS.items() if name.startswith(tuple(f"{each}." for each in prefixes))
    ]
    assert len(parts) == 1, name
    narrow: tuple[Module, ...] = ("mlp",) if re.match(rf"{re.escape(_LAYERS)}\.\d+\.mlp\.", name) else ()
    return (*narrow, *parts)


def freeze(model: nn.Module, trained: Sequence[Module]) -> None:
    """Let gradients and train mode reach only the trained parts."""
    model.requires_grad_(False).eval()
    for part in trained:
        layers = [f"{_LAYERS}.{name}.mlp" for name, _ in model.get_submodule(_LAYERS).named_children()]
        for name in layers if part == "mlp" else PARTS[part]:
            model.get_submodule(name).requires_grad_(True).train()
