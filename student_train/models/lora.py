"""LoRA: adapters of low rank in the decoder, peft's while they train, merged into its weights in a checkpoint.

Source: LoRA (arXiv 2106.09685). As in LLaVA's recipe the projector trains whole.
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
    """Put adapters that change nothing yet into a LLaVA's decoder, in place, drawn by torch's own generator.

    They train, in train mode; the rest of the decoder is frozen. ConfigError for modules that are not there.
    """
    if is_sparse(model.config):
        raise ConfigError("lora: the student's decoder is a mixture of experts; leave lora out, or train a dense one")
    decoder = model.get_submodule(_DECODER)
    linear = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, torch.nn.Linear)}
    if missing := sorted(set(section.modules) - linear):
        raise ConfigError(
            f"lora.modules: the decoder has no {', '.join(missing)}; its linear layers are {', '.join(sorted(linear))}"
        )
    from peft import inject_adapter_in_model

    others = {name: p.requires_grad for name, p in model.named_parameters() if not name.startswith(_DECODER)}
    inject_adapter_in_model(_peft_config(section), model)  # which freezes all but the adapters
    for name, parameter in model.named_parameters():
        if name in others:
            parameter.requires_grad_(others[name])
    decoder.train()


def merged(weights: Mapping[str, Tensor], section: LoraSection) -> dict[str, Tensor]:
    """The weights of a model with adapters as those of one without: W + alpha / rank * B A, under its names."""
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
    """Write what peft's PeftModel.from_pretrained puts upon the checkpoint `base`: adapters and trained projector."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": weight.detach().to("cpu").contiguous()
        for name, weight in weights.items()
        if _is_adapter(name) or "multi_modal_projector." in name
    }
    folder.mkdir()
    config: Any = _peft_config(section)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save = ["multi_modal_projector"]
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(section: LoraSection) -> Any:
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
