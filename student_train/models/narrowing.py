"""Narrows a decoder: removes neurons of its MLPs and channels of its hidden states, those with small weights.

A neuron's weight is the product of three L2 norms: of its gate's row, its up projection's row and its down projection's
column. A neuron that cannot act has a zero factor, so it goes first. A channel's weight is what modules write into it:
the mean square of its embeddings, the sum of squares of its rows of every attention's output projection, every MLP's
down projection, and the second layer of the projector of images. These are the expected squares of what is written,
for independent inputs of unit variance. The inner neurons of that projector, as many as channels in transformers'
classes, are weighed as an MLP's.

Root-mean-square norms divide by the number of channels, so their gains are multiplied by sqrt(old / new): where removed
channels were zero, outputs stay as they were (but for the norms' epsilon).

Legend: d hidden, m neurons of an MLP, v vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from storage.errors import ConfigError
from student_train.config import PrunedWidthSection, PruneSection
from student_train.models.huggingface import find_auto_class

_DECODERS = ("llama", "mistral", "qwen2", "qwen3")  # whose hidden size can be pruned: RMS norms with plain gains
_WRAPPERS = ("llava", "fast_vlm")
_MLP = ("gate_proj", "up_proj", "down_proj")


def check_widths(model: Any, section: PruneSection) -> None:
    """Check that a model has the widths to prune. ConfigError if not."""
    width = section.width
    if width is None:
        return
    text = model.config.get_text_config()
    kind = f"{section.model} is a {model.config.model_type!r}"
    for name in ("intermediate_size", "hidden_size"):
        wanted, own = getattr(width, name), getattr(text, name, None)
        if wanted is not None and (not isinstance(own, int) or wanted > own):
            raise ConfigError(f"prune.width.{name} is {wanted}, but that of {section.model} is {own}; lower it")
    if width.intermediate_size is not None:
        for number, layer in enumerate(model.get_decoder().layers):
            mlp = getattr(layer, "mlp", None)
            shapes = [getattr(getattr(mlp, name, None), "weight", torch.empty(0)).shape for name in _MLP]
            rows, columns = (text.intermediate_size, text.hidden_size), (text.hidden_size, text.intermediate_size)
            if shapes != [rows, rows, columns]:
                raise ConfigError(
                    f"prune.width.intermediate_size: {kind}, whose layer {number} is not an MLP of gate_proj, up_proj "
                    f"and down_proj with {text.intermediate_size} neurons; remove it"
                )
    if width.hidden_size is not None:
        is_known = text.model_type in _DECODERS and (text is model.config or model.config.model_type in _WRAPPERS)
        if not is_known:
            raise ConfigError(
                f"prune.width.hidden_size: {kind} with the decoder {text.model_type!r}, expected one of "
                f"{', '.join(_DECODERS)}, alone or in a LLaVA or FastVLM; remove it"
            )
        try:
            _change_widths(model.config, width)
        except Exception as error:  # whatever a config of transformers raises for widths that it does not take
            raise ConfigError(
                f"prune.width.hidden_size is {width.hidden_size}, which {section.model} cannot have: "
                f"{str(error).strip().splitlines()[-1].strip()}; give another one"
            ) from error


def narrow_decoder(model: Any, width: PrunedWidthSection) -> Any:
    """Return a model with narrower MLPs, hidden states or both; what stays is copied, but for the gains of norms."""
    new_config = _change_widths(model.config, width)
    weights = dict(model.state_dict())
    decoder = find_name(model, model.get_decoder())
    if width.intermediate_size is not None:
        for number in range(model.config.get_text_config().num_hidden_layers):
            _narrow_mlp(weights, f"{decoder}.layers.{number}.mlp.", _MLP, width.intermediate_size)
    if width.hidden_size is not None:
        _narrow_hidden(weights, model, decoder, width.hidden_size)
    smaller = find_auto_class(new_config).from_config(new_config, dtype=model.dtype).eval()
    smaller.load_state_dict(weights, strict=True)
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller


def _change_widths(config: Any, width: PrunedWidthSection) -> Any:
    """Return a copy of a model's config with other widths. Errors: those of the config's own checks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if width.intermediate_size is not None:
        text.intermediate_size = width.intermediate_size
    if width.hidden_size is not None:
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads  # as it was
        text.hidden_size = width.hidden_size
    if validate := getattr(text, "validate", None):
        validate()
    return config


def _narrow_mlp(weights: dict[str, Tensor], prefix: str, names: Sequence[str], num_kept: int) -> None:
    """Keep the heaviest neurons of an MLP: rows of its first projections, columns of its last one."""
    *first, last = names
    weight = weights[f"{prefix}{last}.weight"].float().norm(dim=0)
    for name in first:
        weight = weight * _measure_rows(weights, f"{prefix}{name}").sqrt()
    kept = _select_heaviest(weight, num_kept)
    for name in first:
        _select_rows(weights, f"{prefix}{name}", kept)
    weights[f"{prefix}{last}.weight"] = weights[f"{prefix}{last}.weight"][:, kept]


def _narrow_hidden(weights: dict[str, Tensor], model: Any, decoder: str, num_kept: int) -> None:
    """Keep the heaviest channels of the hidden states, in every module that writes or reads them."""
    text = model.config.get_text_config()
    layers = [f"{decoder}.layers.{number}." for number in range(text.num_hidden_layers)]
    writers = [f"{layer}{name}" for layer in layers for name in ("self_attn.o_proj", "mlp.down_proj")]
    readers = [
        f"{layer}{name}"
        for layer in layers
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    gains = [f"{layer}{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
    embedding, head = f"{decoder}.embed_tokens.weight", find_name(model, model.get_output_embeddings())
    projector = "model.multi_modal_projector."
    if f"{projector}linear_2.weight" in weights:
        _narrow_mlp(weights, projector, ("linear_1", "linear_2"), num_kept)
        writers.append(f"{projector}linear_2")
    weight = weights[embedding].float().square().mean(dim=0)
    for writer in writers:
        weight = weight + _measure_rows(weights, writer)
    kept = _select_heaviest(weight, num_kept)
    for writer in writers:
        _select_rows(weights, writer, kept)
    for reader in (*readers, head):
        weights[f"{reader}.weight"] = weights[f"{reader}.weight"][:, kept]
    weights[embedding] = weights[embedding][:, kept]
    scale = math.sqrt(text.hidden_size / num_kept)
    for gain in (*gains, f"{decoder}.norm"):
        weights[f"{gain}.weight"] = weights[f"{gain}.weight"][kept] * scale


def _measure_rows(weights: dict[str, Tensor], name: str) -> Float[Tensor, " d"]:
    """Return the sum of squares of each row of a linear layer, its bias included."""
    total = weights[f"{name}.weight"].float().square().sum(dim=1)
    bias = weights.get(f"{name}.bias")
    return total if bias is None else total + bias.float().square()


def _select_rows(weights: dict[str, Tensor], name: str, kept: Int[Tensor, " k"]) -> None:
    for part in (f"{name}.weight", f"{name}.bias"):
        if part in weights:
            weights[part] = weights[part][kept]


def _select_heaviest(weight: Float[Tensor, " d"], num_kept: int) -> Int[Tensor, " k"]:
    """Return the places of the largest weights in their order; of equal ones the earlier."""
    return torch.sort(weight, descending=True, stable=True).indices[:num_kept].sort().values


def find_name(model: nn.Module, wanted: nn.Module) -> str:
    """Return the dotted name of a module inside a model."""
    return next(name for name, module in model.named_modules() if module is wanted)
