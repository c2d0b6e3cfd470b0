"""What a vision tower gives a projector: its hidden states as a sequence, or its features as a map.

No table of architectures: the tower's modules run once without memory (PyTorch's meta device), and the shapes of
their outputs decide. A table of known class tokens spares that for the usual towers.

Legend: b images, n positions, f channels of the tower, h w height and width of its map.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from storage.errors import ConfigError, StillhouseError
from student_train.models.huggingface import TIMM, check_timm, import_transformers

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # positions before the patches


@dataclass(frozen=True)
class TowerFeatures:
    """The shape of a tower's features for images of one size."""

    kind: Literal["sequence", "map"]
    num_positions: int  # visual tokens, class and register tokens among them
    num_prefix: int | None  # of these, the ones before the patches; None: not known
    width: int


def read_image_size(image_processor: Any) -> tuple[int | None, int | None]:
    """Return height and width of the pixels that an image processor makes; None where it does not say."""
    size = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", 0) else None
    size = size or getattr(image_processor, "size", None) or {}
    return size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))


def measure_tower(config: Any, pixels: Sequence[int], *, layer: int | Sequence[int], place: str) -> TowerFeatures:
    """Measure a tower's features of images of `pixels` (height, width), without weights.

    `layer`: of the hidden states, or several. ConfigError: a tower that neither LLaVA nor FastVLM can call.
    """
    check_timm(config, place)
    kind = f"a {config.model_type!r}"
    layers = [layer] if isinstance(layer, int) else list(layer)
    output = _run_without_weights(config, pixels, f"{place}: {kind}")
    last, states = output.last_hidden_state, getattr(output, "hidden_states", None)
    width = getattr(config, "hidden_size", None)
    if last.dim() == 4:
        return _measure_map(config, last, f"{place}: {kind}")
    if config.model_type == TIMM or last.dim() != 3 or states is None:
        raise ConfigError(
            f"{place}: {kind} with features of the shape {tuple(last.shape)} fits neither a LLaVA, which needs hidden "
            "states as sequences of transformers' own vision models, nor a FastVLM, which needs a map (images, "
            "channels, height, width); give a tower of one of these kinds"
        )
    for chosen in layers:
        if not -len(states) <= chosen < len(states):
            raise ConfigError(
                f"{place}: feature_layer is {chosen}, but {kind} has {len(states) - 1} layers; give one of "
                f"{-len(states)} to {len(states) - 1}"
            )
    shapes = {tuple(states[chosen].shape) for chosen in layers}
    if width is None or len(shapes) != 1 or (shape := shapes.pop())[2:] != (width,):
        raise ConfigError(
            f"{place}: layer {layer} of {kind} has features of the shape {tuple(states[layers[0]].shape)}, but its "
            f"hidden_size is {width}; a LLaVA needs layers of (1, positions, hidden_size)"
        )
    num_patches = _count_patches(config, pixels)
    prefix = None if num_patches is None or num_patches > shape[1] else shape[1] - num_patches
    return TowerFeatures("sequence", shape[1], prefix, width)


def _measure_map(config: Any, last: torch.Tensor, place: str) -> TowerFeatures:
    _, channels, height, width = last.shape
    given = getattr(config, "hidden_size", None)
    if given not in (None, channels):
        hint = " (a map with its channels last?)" if given == width else ""
        raise ConfigError(
            f"{place} has a map of {channels} channels{hint}, but its config says hidden_size {given}; a FastVLM "
            "needs (images, hidden_size, height, width)"
        )
    return TowerFeatures("map", height * width, 0, channels)


def _count_patches(config: Any, pixels: Sequence[int]) -> int | None:
    patch = getattr(config, "patch_size", None)
    return (pixels[0] // patch) * (pixels[1] // patch) if isinstance(patch, int) and patch > 0 else None


def _run_without_weights(config: Any, pixels: Sequence[int], place: str) -> Any:
    auto = import_transformers().AutoModel
    is_timm = config.model_type == TIMM
    try:
        with torch.device("meta"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = auto.from_config(config).eval()
            if is_timm and getattr(model.timm_model, "output_fmt", "NCHW") == "NHWC":
                raise ConfigError(f"{place} has a map with its channels last, a FastVLM needs them first")
            options = {} if is_timm else {"output_hidden_states": True}
            channels = getattr(config, "num_channels", None) or 3
            return model(torch.empty(1, channels, *pixels), return_dict=True, **options)
    except StillhouseError:
        raise
    except Exception as error:  # whatever a foreign architecture raises for inputs that it does not take
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(
            f"{place} cannot make features of {pixels[0]} x {pixels[1]} pixels alone: {first_line}"
        ) from error
