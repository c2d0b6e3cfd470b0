"""The original LLaVA's checkpoints (llava_llama, llava_qwen), and a lone mm_projector.bin, put onto its base.

LLaVA-NeXT's code, from which llava_qwen comes, takes the last but one layer of SigLIP by deleting the last layer and
the pooling head, and gives all positions to the projector, whatever mm_vision_select_feature says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.conversion.chat_templates import ChatTemplate, get_template
from stillhouse.conversion.conversion import Conversion, Options, get_required, read_layer, rename
from stillhouse.conversion.processor_files import (
    Vision,
    check_template,
    load_source_tokenizer,
    make_config,
    read_strategy,
    read_tower_config,
)
from stillhouse.conversion.source_tensors import WeightFile, list_tensors, list_weight_files, read_json
from stillhouse.conversion.tensor_plan import MapName, Piece
from storage.errors import ConfigError

NAME = "llava"
PROJECTOR = "mm_projector.bin"
DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_qwen": "qwen2"}
_TEMPLATES = {"llama": "vicuna_v1", "qwen2": "chatml"}
_OWN_KEYS = (  # of LLaVA; all others belong to the decoder
    "mm_", "image_", "tune_", "freeze_", "unfreeze_", "tokenizer_", "use_mm_", "model_type", "architectures",
    "transformers_version", "_name_or_path", "_attn_implementation", "auto_map", "vision_tower", "use_cache",
)  # fmt: skip
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_RULES = (
    (r"model\.(embed_tokens|layers|norm)\.(.*)", r"language_model.model.\1.\2"),
    (r"lm_head\.weight", r"language_model.lm_head.weight"),
    (r"model\.vision_tower\.vision_tower\.vision_model\.(.*)", r"vision_tower.vision_model.\1"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
)
_DROPPED = (".rotary_emb.inv_freq", ".position_ids")


def read(folder: Path, config: Mapping[str, Any], options: Options) -> Conversion:
    """Read a checkpoint's description. Errors: ConfigError for what cannot be mapped, by its key."""
    place = folder / "config.json"
    _check_keys(config, place)
    decoder, notes = _read_decoder(config, place)
    vision = _read_vision(config, options, place)
    files, where = _list_files(folder, options)
    tokenizer = load_source_tokenizer(options.tokenizer or where, decoder)
    template = get_template(options.template or _TEMPLATES[decoder.model_type])
    check_template(template, tokenizer, place=f"{where}")
    names = [tensor.name for tensor in list_tensors(files)]
    if not any(name.startswith(_TOWER_PREFIX) for name in names):
        tower = _find_tower_folder(config, options, place)
        whole_model = "vision_config" in read_json(tower / "config.json")
        files += list_weight_files(tower, prefix=_TOWER_PREFIX)
        notes.append(f"the vision tower's weights are those of {tower.name}, since the source has none")
        map_name = _make_map(vision, drop_text=whole_model)
    else:
        map_name = _make_map(vision, drop_text=False)
    return Conversion(
        NAME,
        decoder,
        vision,
        files,
        map_name,
        tokenizer,
        template,
        notes=(*notes, _describe_template(template, options)),
    )


def _describe_template(template: ChatTemplate, options: Options) -> str:
    why = "as --template says" if options.template else "the format's own"
    return f"chat template {template.name}, whose answers end with {template.end_token}: {why}"


def _check_keys(config: Mapping[str, Any], place: Path) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "image_aspect_ratio": (None, "square", "pad"),
        "mm_use_im_start_end": (None, False),
        "mm_resampler_type": (None,),
    }
    advice = {
        "image_aspect_ratio": "; models with tiles are on the Hub in transformers' form, such as those of llava-hf",
        "mm_use_im_start_end": "; tokens around an image cannot be mapped",
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            expected = " or ".join(repr(value) for value in values)
            raise ConfigError(f"{place}: {key} is {config.get(key)!r}, expected {expected}{advice.get(key, '')}")


def _read_decoder(config: Mapping[str, Any], place: Path) -> tuple[Any, list[str]]:
    """Return the decoder's configuration out of the flat one, and notes."""
    notes: list[str] = []
    kind = DECODERS[config["model_type"]]
    settings = {key: value for key, value in config.items() if not key.startswith(_OWN_KEYS)}
    if kind == "qwen2" and settings.pop("rope_scaling", None):
        notes.append("rope_scaling of config.json is left out, as LLaVA-NeXT's code does for Qwen")
    if config.get("mm_use_im_patch_token", True):
        notes.append(
            "the token <im_patch>, which the source's loader adds with a random row, is left out; no prompt has it"
        )
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        get_required(config, key, place)
    return make_config({"model_type": kind, **settings}, place=f"{place}"), notes


def _read_vision(config: Mapping[str, Any], options: Options, place: Path) -> Vision:
    name = get_required(config, "mm_vision_tower", place)
    tower = read_tower_config(name, folder=options.vision_tower, place=f"{place}: mm_vision_tower")
    aspect = config.get("image_aspect_ratio") or "square"
    if tower.model_type == "siglip_vision_model":
        tower.num_hidden_layers -= 1
        tower.vision_use_head = False
        return Vision(tower, -1, "full", aspect)
    layer = read_layer(get_required(config, "mm_vision_select_layer", place), place=f"{place}: mm_vision_select_layer")
    feature = config.get("mm_vision_select_feature", "patch")
    return Vision(tower, layer, read_strategy(feature, place=f"{place}: mm_vision_select_feature"), aspect)


def _list_files(folder: Path, options: Options) -> tuple[tuple[WeightFile, ...], Path]:
    """Return the weight files, and the folder with the tokenizer."""
    if not (folder / PROJECTOR).is_file():
        return list_weight_files(folder), folder
    if options.base is None:
        raise ConfigError(
            f"{folder}: has a projector alone ({PROJECTOR}); give the folder of the decoder that it was trained for: "
            "--base DIR"
        )
    return (*list_weight_files(options.base), WeightFile(folder / PROJECTOR)), options.base


def _find_tower_folder(config: Mapping[str, Any], options: Options, place: Path) -> Path:
    folder = options.vision_tower or Path(config["mm_vision_tower"])
    if not folder.is_dir():
        raise ConfigError(
            f"{place.parent}: has no weights of the vision tower {config['mm_vision_tower']}; download it and give its "
            "folder: --vision-tower DIR"
        )
    return folder


def _make_map(vision: Vision, *, drop_text: bool) -> MapName:
    """`drop_text`: the tower's file is of a whole CLIP or SigLIP, whose text half and scales are left out."""
    is_siglip = vision.config.model_type == "siglip_vision_model"
    deleted = f"{_TOWER_PREFIX}vision_model.encoder.layers.{vision.config.num_hidden_layers}."

    def map_name(name: str) -> Sequence[Piece] | None:
        if name.endswith(_DROPPED) or name == "model.image_newline":  # only tiles have newlines
            return ()
        if drop_text and name.startswith(_TOWER_PREFIX) and not name.startswith(f"{_TOWER_PREFIX}vision_model."):
            return ()
        if is_siglip and name.startswith((deleted, f"{_TOWER_PREFIX}vision_model.head.")):
            return ()
        return rename(name, _RULES)

    return map_name
