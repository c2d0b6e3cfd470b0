"""Gradient checkpointing: the decoder's layers are computed again in the backward pass, frozen or not."""

from __future__ import annotations

import importlib
from typing import Any

from storage.errors import ConfigError
from student_train.models.loading import part_of


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep a layer's input in place of its activations, for every decoder layer.

    transformers recomputes a layer only where it is in train mode, and a frozen decoder is in eval mode although the
    projector's gradient flows through it. So the layer itself is switched, and its submodules, with their dropout,
    are left as they are. ConfigError: the architecture cannot, or a frozen layer has dropout of its own.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: transformers has none for a {model.config.model_type!r}; leave it out"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer_class = importlib.import_module("transformers.modeling_layers").GradientCheckpointingLayer
    for name, module in model.named_modules():
        if not isinstance(module, layer_class) or module.training or part_of(name) != "llm":
            continue
        dropout = {key: value for key, value in vars(module).items() if key.endswith("dropout") and value}
        if dropout:
            raise ConfigError(
                f"gradient_checkpointing: the frozen layer {name} has {dropout}, which recomputing it would switch on; "
                "set it to 0 in the student's config.json, or leave gradient_checkpointing out"
            )
        module.training = True
