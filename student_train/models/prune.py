"""Prunes a decoder: removes layers, narrows MLPs and hidden states, copies what stays.

The gains of norms alone change (narrowing.py).

Works on plain decoders and on the decoder of a vision-language model. Sources: ShortGPT (Men et al. 2024) for the
measure by which layers go, Minitron (Muralidharan et al. 2024) for pruning depth and width before distillation.

Legend: l layers of the source, n layers that stay, d hidden, m neurons of an MLP.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from storage.errors import ConfigError, StillhouseError
from student_train.config import PruneSection
from student_train.models.checkpoint_contents import describe_pruning
from student_train.models.huggingface import find_auto_class, load_config, load_weights
from student_train.models.made_checkpoints import Making, ensure_made
from student_train.models.narrowing import check_widths, find_name, narrow_decoder
from student_train.models.tower_features import check_timm

_PER_LAYER = ("layer_types", "no_rope_layers")  # lists of a decoder's config with an item for each layer
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PLAIN = (bool, int, float, str, type(None))
_PLACES = {"layer_idx", "training"}  # attributes that may differ between a layer and its copy


class LayerMeasure(Protocol):
    """Measures how much each layer of a decoder changes the hidden state."""

    def describe(self) -> Mapping[str, Any]:
        """Describe the samples that it measures on, as JSON."""
        ...

    def measure(self, model: Any, layers: Sequence[nn.Module]) -> Sequence[float]:
        """Return each layer's mean 1 - cos(input, output)."""
        ...


def ensure_pruned(
    section: PruneSection,
    folder: str | Path,
    *,
    measure: LayerMeasure,
    replaces: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Prune a model into the checkpoint at `folder`, unless it exists and was pruned from the same inputs.

    Call it on one rank. `measure` is used for `choose: least_change` alone; `replaces` and `check` as for
    `ensure_made`. Errors: ConfigError for a model that cannot be pruned in this way, and for a checkpoint that was made
    from other inputs; StillhouseError for a model that cannot be read.
    """

    def describe() -> dict[str, Any]:
        samples = {"samples": measure.describe()} if section.measures_change else {}
        return {**describe_pruning(section), **samples}

    making = Making("prune", describe=describe, build=lambda: prune(section, measure=measure), processor=section.model)
    ensure_made(making, folder, replaces=replaces, check=check)


def check_pruning(section: PruneSection, place: str) -> None:
    """Check that a model exists and can be pruned so, without reading weights. `place`: prefix of messages.

    Errors: ConfigError.
    """
    try:
        config = load_config(section.model)
        _check_config(config, section)
        chosen = _choose_layers(section, config.get_text_config().num_hidden_layers, None)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            auto = find_auto_class(config)
            model = auto.from_config(config)
            if chosen is not None:
                smaller = auto.from_config(_make_config(config, chosen))
                _check_copies(_list_layers(model, section), _list_layers(smaller, section), chosen, section)
        _list_layers(model, section)
        check_widths(model, section)
    except StillhouseError as error:
        raise ConfigError(f"{place}: {error}") from error


@torch.no_grad()
def prune(section: PruneSection, *, measure: LayerMeasure) -> Any:
    """Return the pruned model, in its checkpoint's dtype. Errors as `ensure_pruned`."""
    _check_config(load_config(section.model), section)
    model: Any = load_weights(section.model, dtype="auto").eval()
    layers = _list_layers(model, section)
    check_widths(model, section)
    changes = measure.measure(model, list(layers)) if section.measures_change else None
    chosen = _choose_layers(section, len(layers), changes)
    assert chosen is not None
    if section.layers is not None:
        model = _keep_layers(model, chosen, section)
    return model if section.width is None else narrow_decoder(model, section.width)


def space_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Return evenly spaced layers, the first and the last among them; of one, the first."""
    steps = max(1, num_kept - 1)
    return tuple((2 * number * (num_layers - 1) + steps) // (2 * steps) for number in range(num_kept))  # rounded


def keep_most_changing(changes: Sequence[float], num_kept: int) -> tuple[int, ...]:
    """Return the layers with the largest changes, in their order; of equal ones the earlier."""
    by_change = sorted(range(len(changes)), key=lambda layer: (-changes[layer], layer))
    return tuple(sorted(by_change[:num_kept]))


def _choose_layers(section: PruneSection, num_layers: int, changes: Sequence[float] | None) -> tuple[int, ...] | None:
    """Return the layers that stay; None if changes decide and are not known."""
    wanted = section.layers
    if wanted is None:
        return tuple(range(num_layers))
    if isinstance(wanted, tuple):
        if wanted[-1] >= num_layers:
            raise ConfigError(
                f"prune.layers names layer {wanted[-1]}, but {section.model} has {num_layers}, from 0 on; name layers "
                f"up to {num_layers - 1}"
            )
        return wanted
    if wanted > num_layers:
        raise ConfigError(f"prune.layers is {wanted}, but {section.model} has only {num_layers}; lower it")
    if not section.measures_change:
        return space_layers(num_layers, wanted)
    return None if changes is None else keep_most_changing(changes, wanted)


def _check_config(config: Any, section: PruneSection) -> None:
    """ConfigError for a model whose decoder cannot be pruned."""
    kind = f"prune.model: {section.model} is a {config.model_type!r}"
    if find_auto_class(config) is None:
        raise ConfigError(f"{kind}, expected a causal decoder or a vision-language model of transformers")
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        check_timm(vision, f"prune.model: {section.model}")
    text = config.get_text_config()
    experts = next((name for name in _EXPERT_FIELDS if getattr(text, name, None)), None)
    if experts is not None:
        raise ConfigError(
            f"{kind} with experts ({experts} is {getattr(text, experts)}), which are not pruned; prune the dense "
            "model, and make the pruned one sparse with `moe`"
        )
    if getattr(vision, "deepstack_visual_indexes", None) and section.layers is not None:
        raise ConfigError(f"{kind}, whose images enter several layers (deepstack), so none can be removed")


def _list_layers(model: Any, section: PruneSection) -> nn.ModuleList:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.get_text_config().num_hidden_layers:
        raise ConfigError(
            f"prune.model: {section.model} is a {model.config.model_type!r}, whose decoder has no list `layers` of "
            "num_hidden_layers modules; it cannot be pruned here"
        )
    return layers


def _make_config(config: Any, chosen: Sequence[int]) -> Any:
    """Return a copy of a model's config for the chosen layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in _PER_LAYER:
        if getattr(text, name, None) is not None:
            setattr(text, name, [getattr(text, name)[layer] for layer in chosen])
    if getattr(text, "max_window_layers", None) is not None:  # layers from this one on have a sliding window
        text.max_window_layers = sum(layer < text.max_window_layers for layer in chosen)
    text.num_hidden_layers = len(chosen)
    return config


def _keep_layers(model: Any, chosen: Sequence[int], section: PruneSection) -> Any:
    """Return a model with the chosen layers alone, their weights and all others copied."""
    smaller = find_auto_class(model.config).from_config(_make_config(model.config, chosen), dtype=model.dtype).eval()
    _check_copies(_list_layers(model, section), _list_layers(smaller, section), chosen, section)
    layers = find_name(model, _list_layers(model, section))
    new_places = {f"{layers}.{old}.": f"{layers}.{new}." for new, old in enumerate(chosen)}
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{layers}."):
            kept[name] = tensor
            continue
        place = f"{layers}.{name.removeprefix(f'{layers}.').split('.')[0]}."
        if place in new_places:
            kept[new_places[place] + name.removeprefix(place)] = tensor
    smaller.load_state_dict(kept, strict=True)
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller


def _check_copies(layers: nn.ModuleList, copies: nn.ModuleList, chosen: Sequence[int], section: PruneSection) -> None:
    """ConfigError if a layer would compute something else at its new place, such as attend with another window."""
    for new, old in enumerate(chosen):
        was, now = _describe_layer(layers[old]), _describe_layer(copies[new])
        differing = next((name for name in [*was, *now] if was.get(name) != now.get(name)), None)
        if differing is not None:
            raise ConfigError(
                f"prune.model: layer {old} of {section.model} would be another at its new place {new}: its {differing} "
                f"is {was.get(differing)}, there {now.get(differing)}; keep layers whose places agree"
            )


def _describe_layer(layer: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a layer's modules, and the shapes of its weights."""
    described: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    for place, module in layer.named_modules():
        prefix = f"{place}." if place else ""
        described[f"{prefix}class"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _PLACES:
                described[prefix + name] = value
    return described
