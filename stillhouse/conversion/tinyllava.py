"""TinyLLaVA Factory's checkpoints, and LLaVA-KD's, which have the same form.

Two layouts: one folder of whole weights (fine-tuned), or a folder for each part without the outer prefix (pretrained).
"patch" drops the first position even of SigLIP, which has no class token: 728 visual tokens of 384 x 384 pixels, the
first patch lost. The target keeps them, since the model was trained so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stillhouse.conversion.chat_templates import ChatTemplate, choose_by_end_token, get_template
from stillhouse.conversion.conversion import Conversion, Options, get_required, read_layer, rename
from stillhouse.conversion.processor_files import (
    Vision,
    check_template,
    check_tower,
    load_source_tokenizer,
    make_config,
    read_strategy,
)
from stillhouse.conversion.source_tensors import WeightFile, list_weight_files
from stillhouse.conversion.tensor_plan import MapName, Piece
from storage.errors import ConfigError

NAME = "tinyllava"
_PARTS = {  # folder of a pretrained part -> prefix of its names in a whole checkpoint
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}
_RULES = (
    (r"language_model\.(?:model\..*|lm_head\.weight)", r"\g<0>"),
    (r"vision_tower\._vision_tower\.vision_model\.(.*)", r"vision_tower.vision_model.\1"),
    (r"connector\._connector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"connector\._connector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
)
_DROPPED = (".rotary_emb.inv_freq", ".position_ids")  # buffers that old versions saved
_REFUSED_DECODERS = {
    "phi": "its output head has a bias, which transformers' LLaVA lacks",
    "openelm": "transformers has no class for it",
}
_TEMPLATES = {  # by the decoder; the end token tells base from instruction-tuned
    "qwen2": ("qwen2_base", "qwen2_instruct"),
    "llama": ("llama",),
    "stablelm": ("phi",),
    "gemma": ("gemma",),
}


def read(folder: Path, config: Mapping[str, Any], options: Options) -> Conversion:
    """Read a checkpoint's description. Errors: ConfigError for what cannot be mapped, by its key."""
    place = folder / "config.json"
    _check_connector(config, place)
    if config.get("vision_model_name_or_path2"):
        raise ConfigError(f"{place}: vision_model_name_or_path2 is set: two towers cannot be mapped")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder}: has a LoRA adapter beside the weights; merge it first, and convert the result")
    aspect = config.get("image_aspect_ratio", "square")
    if aspect not in ("square", "pad"):
        raise ConfigError(f"{place}: image_aspect_ratio is {aspect!r}, expected square or pad; tiles cannot be mapped")
    text = dict(get_required(config, "text_config", place))
    kind = text.get("model_type")
    if kind in _REFUSED_DECODERS:
        raise ConfigError(f"{place}: the decoder is a {kind!r}: {_REFUSED_DECODERS[kind]}")
    if kind not in _TEMPLATES:
        raise ConfigError(f"{place}: text_config.model_type is {kind!r}, expected one of {', '.join(_TEMPLATES)}")
    decoder = make_config(text, place=f"{place}: text_config")
    tower = make_config(dict(get_required(config, "vision_config", place)), place=f"{place}: vision_config")
    tokenizer = load_source_tokenizer(options.tokenizer or folder, decoder)
    template = _choose_template(kind, tokenizer, options, folder)
    vision = Vision(
        check_tower(tower, place=f"{place}: vision_config"),
        read_layer(get_required(config, "vision_feature_layer", place), place=f"{place}: vision_feature_layer"),
        read_strategy(
            get_required(config, "vision_feature_select_strategy", place),
            place=f"{place}: vision_feature_select_strategy",
        ),
        aspect,
    )
    return Conversion(
        NAME,
        decoder,
        vision,
        _list_files(folder),
        _make_map(decoder),
        tokenizer,
        template,
        notes=_describe(vision, template, decoder, options),
    )


def _check_connector(config: Mapping[str, Any], place: Path) -> None:
    kind = config.get("connector_type")
    if kind != "mlp2x_gelu":
        raise ConfigError(
            f"{place}: connector_type is {kind!r}, expected mlp2x_gelu, the only one that transformers' LLaVA has"
        )


def _list_files(folder: Path) -> tuple[WeightFile, ...]:
    present = [name for name in _PARTS if (folder / name).is_dir()]
    if not present:
        return list_weight_files(folder)
    missing = [name for name in _PARTS if name not in present]
    if missing:
        raise ConfigError(f"{folder}: has {', '.join(present)} but lacks {', '.join(missing)}; copy the missing parts")
    return tuple(file for name, prefix in _PARTS.items() for file in list_weight_files(folder / name, prefix=prefix))


def _make_map(decoder: Any) -> MapName:
    """Gemma's old code scaled image rows too, transformers' does not: the projector's last layer takes the factor."""
    factor = math.sqrt(decoder.hidden_size) if decoder.model_type == "gemma" else None

    def scale(tensor: Tensor) -> Tensor:
        assert factor is not None
        return tensor * tensor.new_tensor(factor) if tensor.device.type != "meta" else tensor

    def map_name(name: str) -> Sequence[Piece] | None:
        if name.endswith(_DROPPED):
            return ()
        pieces = rename(name, _RULES)
        if pieces and factor is not None and ".linear_2." in pieces[0].name:
            return [Piece(pieces[0].name, scale)]
        return pieces

    return map_name


def _choose_template(kind: str, tokenizer: Any, options: Options, folder: Path) -> ChatTemplate:
    if options.template is not None:
        template = get_template(options.template)
    else:
        template = choose_by_end_token(_TEMPLATES[kind], tokenizer.eos_token)
    check_template(template, tokenizer, place=f"{folder}")
    return template


def _describe(vision: Vision, template: ChatTemplate, decoder: Any, options: Options) -> tuple[str, ...]:
    why = "as --template says" if options.template else "chosen by the tokenizer's end-of-sequence token"
    notes = [f"chat template {template.name}, whose answers end with {template.end_token}: {why}"]
    if vision.strategy == "default" and vision.config.model_type == "siglip_vision_model":
        notes.append(
            f"{vision.num_tokens} visual tokens an image: the source drops the first patch (strategy patch), and so "
            "does the target"
        )
    if decoder.model_type == "gemma":
        notes.append("the projector's last layer is multiplied by the root of the hidden size, by which Gemma scales")
    return tuple(notes)
