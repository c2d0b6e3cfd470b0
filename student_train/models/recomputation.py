"""Gradient checkpointing: recomputes the decoder's layers in the backward pass, frozen or not."""

from __future__ import annotations

import importlib
from typing import Any

from storage.errors import ConfigError
from student_train.models.loading import find_part


def enable_gradient_checkpointing(model: Any) -> None:
    """Make every decoder layer keep its input and recompute its activations in the backward pass.

    transformers recomputes a layer only in train mode, but a frozen decoder is in eval mode although the projector's
    gradient flows through it. So train mode is set on the layer alone, and its submodules, with their dropout, keep
    their mode. ConfigError: the architecture does not support it, or a frozen layer has dropout of its own.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: transformers does not support it for {model.config.model_type!r}; remove it"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer_class = importlib.import_module("transformers.modeling_layers").GradientCheckpointingLayer
    for name, module in model.named_modules():
        if not isinstance(module, layer_class) or module.training or find_part(name) != "llm":
            continue
        dropout = {key: value for key, value in vars(module).items() if key.endswith("dropout") and value}
        if dropout:
            raise ConfigError(
                f"gradient_checkpointing: the frozen layer {name} has {dropout}, which recomputation would activate; "
                "set it to 0 in the student's config.json, or remove gradient_checkpointing"
            )
        module.training = True
