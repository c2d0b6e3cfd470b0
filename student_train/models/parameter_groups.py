"""Groups trained parameters by learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from student_train.config import Module
from student_train.models.loading import find_modules


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters with one learning rate and one weight decay."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0  # multiplies the stage's learning rate
    weight_decay: float = 0.0


def make_parameter_groups(
    model: nn.Module, *, lr: float, module_lr: Mapping[Module, float], weight_decay: float
) -> list[ParameterGroup]:
    """Group all trainable parameters of a model; no group is empty.

    A module in `module_lr` has its own peak; the narrowest one that has a peak counts. Norms and biases get no decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = [module_lr[module] for module in find_modules(name) if module in module_lr]
            key = (own[0] / lr if own else 1.0, weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [ParameterGroup(parameters, *key) for key, parameters in groups.items()]
