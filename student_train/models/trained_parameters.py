"""Counts a student's parameters by module, and which of them a stage trains, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from student_train.config import Module
from student_train.models.loading import PARTS, Checkpoint, build_without_weights, find_modules, find_part

_ORDER: tuple[Module, ...] = ("vision", "projector", "llm", "layers", "mlp")


@dataclass
class ModuleCount:
    """The parameters of one module; those of a narrower module are not counted in `llm` as well."""

    num_all: int = 0
    num_trained: int = 0
    num_tensors: int = 0  # that train
    names: dict[str, None] = field(default_factory=dict)  # of submodules that train, in order; a projector's alone


def count_parameters(checkpoint: Checkpoint, trained: Sequence[Module]) -> dict[Module, ModuleCount]:
    """Count parameters by the narrowest module that contains them, in the order vision, projector, llm, layers, mlp.

    `layers` has no count of its own unless it is trained.
    """
    return count_model_parameters(build_without_weights(checkpoint), trained)


def count_model_parameters(model: nn.Module, trained: Sequence[Module]) -> dict[Module, ModuleCount]:
    """As `count_parameters`, of a built model. Shared weights count once."""
    counts: dict[Module, ModuleCount] = {}
    for name, parameter in model.named_parameters():
        if find_part(name) is None:
            continue
        modules: list[Module] = [one for one in find_modules(name) if one != "layers" or "layers" in trained]
        count = counts.setdefault(modules[0], ModuleCount())
        count.num_all += parameter.numel()
        if any(module in trained for module in modules):
            count.num_trained += parameter.numel()
            count.num_tensors += 1
            if modules[0] == "projector":
                count.names[next(prefix for prefix in PARTS["projector"] if name.startswith(prefix))] = None
    return {module: counts[module] for module in _ORDER if module in counts}


def describe_trained(counts: dict[Module, ModuleCount], *, lora: bool = False) -> str:
    """Describe what trains, such as `projector 12,480 of 12,480 (8 tensors: model.connector), llm none of 361,821,120`.

    `lora`: whether adapters of the decoder train in place of its weights.
    """
    parts = []
    for module, count in counts.items():
        if lora and module in ("llm", "mlp"):
            parts.append(f"{module} adapters beside its {count.num_all:,}")
        elif count.num_trained:
            names = f": {', '.join(count.names)}" if count.names else ""
            parts.append(f"{module} {count.num_trained:,} of {count.num_all:,} ({count.num_tensors} tensors{names})")
        else:
            parts.append(f"{module} none of {count.num_all:,}")
    return ", ".join(parts)
