"""Makes the processor of a converted model: tokenizer with an image token, chat template, image preprocessing.

Foreign checkpoints have no image processor: their code takes the vision tower's. The towers' values here are CLIP's and
SigLIP's own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.conversion.chat_templates import IMAGE_TOKEN, ChatTemplate
from stillhouse.conversion.source_tensors import read_json
from storage.errors import ConfigError, StillhouseError
from student_train.models.checkpoint import PROCESSOR_FILES
from student_train.models.huggingface import import_transformers, load_tokenizer
from student_train.models.tower_features import CLASS_TOKENS

Strategy = Literal["default", "full"]  # whether a tower's first position is dropped
_OF_A_RUN = ("model_type", "transformers_version", "attn_implementation", "auto_map")  # no facts about a model
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")  # besides sentencepiece's *.model
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# By Hub id, for configurations that only name their tower; everything else is a default of transformers' classes.
_KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 336, "projection_dim": 768,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Vision:
    """A tower and what the projector reads of it."""

    config: Any  # of the tower
    layer: int
    strategy: Strategy
    aspect: Literal["square", "pad"]  # how an image becomes a square: as the tower's own processor does, or padded

    @property
    def num_tokens(self) -> int:
        """Visual tokens of an image."""
        num_patches = (self.config.image_size // self.config.patch_size) ** 2
        return num_patches + CLASS_TOKENS[self.config.model_type] - (self.strategy == "default")


def read_tower_config(name: str, *, folder: Path | None, place: str) -> Any:
    """Return the configuration of a CLIP or SigLIP tower, from a local folder or a known Hub id. ConfigError else."""
    local = folder if folder is not None else Path(name)
    if local.is_dir():
        settings = read_json(local / "config.json")
        kind = settings.get("model_type")
        if kind in _TOWERS:  # a whole CLIP or SigLIP
            settings, kind = settings.get("vision_config") or {}, _TOWERS[kind]
        return check_tower(make_config({**settings, "model_type": kind}, place=f"{local}"), place=f"{local}")
    if name in _KNOWN_TOWERS:
        return make_config(_KNOWN_TOWERS[name], place=place)
    known = ", ".join(_KNOWN_TOWERS)
    raise ConfigError(
        f"{place} names the vision tower {name}, which is neither a local folder nor one whose sizes are known "
        f"({known}); download it and give its folder: --vision-tower DIR"
    )


def make_config(settings: dict[str, Any], *, place: str) -> Any:
    """Return transformers' configuration of a dictionary with its model_type. ConfigError for an unknown one."""
    kind = settings.get("model_type")
    mapping = import_transformers().CONFIG_MAPPING
    if kind not in mapping:
        raise ConfigError(f"{place}: model_type is {kind!r}, which transformers has no class for; it cannot be mapped")
    rest = {key: value for key, value in settings.items() if key not in _OF_A_RUN and not key.startswith("_")}
    try:
        return mapping[kind](**rest)
    except Exception as error:  # transformers' strict classes raise errors of their own
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"{place}: is no configuration of a {kind!r}: {first_line}") from error


def check_tower(config: Any, *, place: str) -> Any:
    """Return the configuration if it is of a CLIP or SigLIP tower. ConfigError otherwise."""
    if config.model_type not in CLASS_TOKENS:
        raise ConfigError(
            f"{place}: the vision tower is a {config.model_type!r}, expected one of {', '.join(CLASS_TOKENS)}"
        )
    return config


def read_strategy(value: Any, *, place: str) -> Strategy:
    """Return transformers' name of a feature selection: `patch` drops the first position, `cls_patch` nothing."""
    strategies: dict[Any, Strategy] = {"patch": "default", "cls_patch": "full"}
    if value not in strategies:
        raise ConfigError(f"{place} is {value!r}, expected patch or cls_patch")
    return strategies[value]


def load_source_tokenizer(folder: Path, decoder: Any) -> Any:
    """Load the tokenizer of a foreign folder, and add the image token if it has none. No remote code.

    `decoder`: its configuration, by which transformers finds the tokenizer's class. Errors: ConfigError.
    """
    files = sorted({path for pattern in PROCESSOR_FILES for path in folder.glob(pattern) if path.is_file()})
    if not any(path.name in _VOCABULARIES or path.suffix == ".model" for path in files):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:12])
        raise ConfigError(
            f"{folder}: has no tokenizer that transformers reads without remote code (it has {found}); give the folder "
            "of one with the same vocabulary: --tokenizer DIR"
        )
    with tempfile.TemporaryDirectory(prefix="stillhouse-tokenizer-") as temporary:
        for path in files:
            if path.parent == folder and not path.name.startswith(("chat_template", "preprocessor", "processor")):
                shutil.copyfile(path, Path(temporary) / path.name)
        _remove_code(Path(temporary) / "tokenizer_config.json")
        settings = {"model_type": decoder.model_type, "vocab_size": decoder.vocab_size}
        (Path(temporary) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        try:
            tokenizer = load_tokenizer(temporary)
        except StillhouseError as error:
            message = str(error).replace(temporary, str(folder))
            raise ConfigError(f"{message}; give another folder: --tokenizer DIR") from error
    return add_image_token(tokenizer, place=f"{folder}")


def _remove_code(path: Path) -> None:
    """Remove the names of a tokenizer's own classes from its settings, so that nobody is asked to run them."""
    if path.is_file() and "auto_map" in (settings := read_json(path)):
        settings.pop("auto_map")
        path.write_text(json.dumps(settings), encoding="utf-8")


def add_image_token(tokenizer: Any, *, place: str) -> Any:
    """Add `<image>` as one special token, with the next free id, unless it is one. ConfigError if it cannot be."""
    from tokenizers import AddedToken

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    ids = tokenizer(f"a{IMAGE_TOKEN}b", add_special_tokens=False)["input_ids"]
    if ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) != 1:
        raise ConfigError(f"{place}: the tokenizer splits {IMAGE_TOKEN} into several tokens; give --tokenizer DIR")
    return tokenizer


def check_template(template: ChatTemplate, tokenizer: Any, *, place: str) -> None:
    """ConfigError if the tokenizer lacks a token that the template writes."""
    known = tokenizer.get_vocab()
    for token in (template.end_token, template.begin_token):
        if token and token not in known:
            raise ConfigError(
                f"{place}: the chat template {template.name} writes {token}, which the tokenizer does not have; say "
                "which template the model was trained with: --template NAME"
            )


def save_processor(folder: Path, tokenizer: Any, vision: Vision, template: ChatTemplate) -> None:
    """Write tokenizer, image processor and chat template; the tokenizer ends a sequence as the template does."""
    tokenizer.eos_token = template.end_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or template.end_token
    processor = import_transformers().LlavaProcessor(
        image_processor=_make_image_processor(vision),
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=vision.strategy,
        num_additional_image_tokens=CLASS_TOKENS[vision.config.model_type],
        image_token=IMAGE_TOKEN,
        chat_template=template.jinja,
    )
    processor.save_pretrained(folder)


def _make_image_processor(vision: Vision) -> Any:
    transformers, size = import_transformers(), vision.config.image_size
    square = {"height": size, "width": size}
    is_siglip = vision.config.model_type == _TOWERS["siglip"]
    if vision.aspect == "pad":
        statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if is_siglip else {}
        return transformers.LlavaImageProcessorPil(
            size={"shortest_edge": size}, crop_size=square, do_pad=True, **statistics
        )
    if is_siglip:
        return transformers.SiglipImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
