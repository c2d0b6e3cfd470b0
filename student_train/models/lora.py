"""LoRA: low-rank adapters in the decoder, by peft in training, merged into its weights in checkpoints.

Source: LoRA (arXiv 2106.09685). As in LLaVA's recipe, the projector is trained without adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError
from student_train.config import LoraSection
from student_train.models.sparse_upcycling import is_sparse

_DECODER = "model.language_model"
_BASE = ".base_layer."
_ADAPTER = "default"
FOLDER = "adapter"


def add_adapters(model: Any, section: LoraSection) -> None:
    """Insert zero-output adapters into a LLaVA's decoder, in place, drawn by torch's global generator.

    Adapters are trainable, in train mode; the rest of the decoder is frozen. ConfigError for modules that the decoder
    lacks.
    """
    if is_sparse(model.config):
        raise ConfigError("lora: the student's decoder is a mixture of experts; remove lora, or train a dense student")
    decoder = model.get_submodule(_DECODER)
    linear = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    if missing := sorted(set(section.modules) - linear):
        raise ConfigError(
            f"lora.modules: the decoder has no {', '.join(missing)}; its linear layers are {', '.join(sorted(linear))}"
        )
    from peft import inject_adapter_in_model

    others = {name: p.requires_grad for name, p in model.named_parameters() if not name.startswith(_DECODER)}
    inject_adapter_in_model(_make_peft_config(section), model)  # which freezes all but the adapters
    for name, parameter in model.named_parameters():
        if name in others:
            parameter.requires_grad_(others[name])
    decoder.train()


def merge_adapters(weights: Mapping[str, Tensor], section: LoraSection) -> dict[str, Tensor]:
    """Return plain weights with the adapters merged, W + alpha / rank * B A, under the names of a plain model."""
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _is_adapter(name):
            continue
        if name.endswith(f"{_BASE}weight"):
            prefix = name.removesuffix(f"{_BASE}weight")
            down, up = (weights[f"{prefix}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
            weight = (weight.float() + section.alpha / section.rank * (up @ down)).to(weight.dtype)
        plain[name.replace(_BASE, ".")] = weight
    return plain


def save_adapter(weights: Mapping[str, Tensor], section: LoraSection, base: str, folder: Path) -> None:
    """Save adapters and trained projector in the form that PeftModel.from_pretrained loads onto `base`."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": weight.detach().to("cpu").contiguous()
        for name, weight in weights.items()
        if _is_adapter(name) or "multi_modal_projector." in name
    }
    folder.mkdir()
    config: Any = _make_peft_config(section)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save = ["multi_modal_projector"]
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _make_peft_config(section: LoraSection) -> Any:
    from peft import LoraConfig

    names = "|".join(map(re.escape, section.modules))
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  # it may be a fraction
        lora_dropout=section.dropout,
        target_modules=rf"model\.language_model\.(?:.*\.)?(?:{names})",
    )


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
