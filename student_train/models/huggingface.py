"""Loads configs, tokenizers, processors and models with transformers; images are always processed by Pillow.

All imports of transformers go through this file. transformers imports torchvision, torchaudio, scikit-learn and
others if they are installed. The student needs none of them: a torchvision built for another torch cannot be
imported at all, torchvision and Pillow resize images differently, and scikit-learn alone takes 1.5 s of every start.
So they are hidden while transformers is imported; transformers caches that they are absent. timm alone needs
torchvision; a torchvision that cannot be imported is repaired when timm imports it.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import ConfigError, StillhouseError
from storage.images.settings import BACKEND, PIXELS_FILE, PixelSettings, read_pixel_settings
from storage.processes import torchvision_shim
from student_train.template_arguments import ARGUMENTS_FILE, read_template_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN_PACKAGES = ("torchvision", "torchaudio", "torchcodec", "sklearn", "scipy", "pandas", "librosa", "soundfile")
TIMM = "timm_wrapper"  # the model type of transformers' wrapper of timm's models
_NEEDS_TIMM = "{place}: the tower is one of timm, which is not installed; install it: pip install 'stillhouse[timm]'"
_PROBES = (  # transformers.utils functions that look for a hidden package, and cache the result
    "is_torchvision_available",
    "is_torchvision_v2_available",
    "is_torchaudio_available",
    "is_torchcodec_available",
    "is_sklearn_available",
    "is_scipy_available",
    "is_pandas_available",
    "is_librosa_available",
    "is_soundfile_available",
)


@contextmanager
def hide_packages(packages: tuple[str, ...] = HIDDEN_PACKAGES) -> Iterator[None]:
    """Make packages that are not imported yet look as if they were not installed, within the context."""
    masked = [name for name in packages if name not in sys.modules]
    for name in masked:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to block an import
    try:
        yield
    finally:
        for name in masked:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def import_transformers() -> Any:
    """Import and return transformers, with quiet logs and without its optional packages."""
    loaded = sys.modules.get("transformers.generation.candidate_generator") is not None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torchvision_shim.install()
    with hide_packages():
        module = importlib.import_module("transformers")
        if not loaded:
            availability = importlib.import_module("transformers.utils.import_utils")
            for probe in _PROBES:
                getattr(availability, probe, bool)()
            importlib.import_module("transformers.models.auto.modeling_auto")
            importlib.import_module("transformers.models.llava.modeling_llava")
    module.logging.disable_progress_bar()
    return module


def is_empty_expert(name: str, config: Any) -> bool:
    """Return whether a parameter belongs to a shared expert of width 0, which is neither saved nor required."""
    text = getattr(config, "text_config", config)
    return ".shared_expert" in name and getattr(text, "shared_expert_intermediate_size", None) == 0


def load_config(folder: str | Path) -> Any:
    """Load a checkpoint's configuration. StillhouseError if there is no readable one."""
    try:
        return _load("configuration", import_transformers().AutoConfig.from_pretrained, folder)
    except StillhouseError as error:
        if "timm" in str(error.__cause__) and find_spec("timm") is None:
            raise ConfigError(_NEEDS_TIMM.format(place=folder)) from error
        raise


def check_timm(config: Any, place: str) -> None:
    """ConfigError for a tower of timm where timm is not installed. `config`: the tower's."""
    if config.model_type == TIMM and find_spec("timm") is None:
        raise ConfigError(_NEEDS_TIMM.format(place=place))


def load_tokenizer(folder: str | Path) -> Any:
    """Load a checkpoint's tokenizer. StillhouseError if there is no readable one."""
    return _load("tokenizer", import_transformers().AutoTokenizer.from_pretrained, folder)


def load_image_processor(folder: str | Path) -> Any:
    """Load a checkpoint's image processor, with the Pillow backend. StillhouseError if there is no readable one."""
    return _load("image processor", import_transformers().AutoImageProcessor.from_pretrained, folder, backend=BACKEND)


def load_pixel_settings(folder: str | Path) -> PixelSettings | None:
    """Load the pixels that a checkpoint was trained with; None if it names none. StillhouseError: a broken file."""
    place = _find_folder_of(folder, PIXELS_FILE)
    return None if place is None else read_pixel_settings(place)


def load_template_arguments(folder: str | Path) -> dict[str, Any]:
    """Load the chat template's arguments that a checkpoint was trained with. StillhouseError: a broken file."""
    place = _find_folder_of(folder, ARGUMENTS_FILE)
    return {} if place is None else read_template_arguments(place)


def _find_folder_of(folder: str | Path, name: str) -> Path | None:
    """Return the local folder of a checkpoint's optional file; None for a Hub id whose repository lacks the file."""
    if Path(folder).is_dir():
        return Path(folder)
    file = import_transformers().utils.cached_file(  # a Hub id's files are fetched one by one
        str(folder),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file).parent


def load_processor(folder: str | Path) -> Any:
    """Load a checkpoint's processor (chat template, tokenizer, images; no videos). StillhouseError if it has none."""
    try:
        kind = _find_processor_class(load_config(folder))
    except StillhouseError:  # a folder with only a processor has no config.json
        kind = None
    if kind is None or "video_processor" not in kind.get_attributes():
        return _load("processor", import_transformers().AutoProcessor.from_pretrained, folder, backend=BACKEND)
    return _load("processor", lambda place: _load_without_videos(kind, place), folder)


def _find_processor_class(config: Any) -> Any:
    import_transformers()
    classes = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING
    return classes.get(type(config), None)


class _NoVideos:
    """Replaces a processor's video processor, whose settings are read even without videos; all are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _load_without_videos(kind: Any, folder: str) -> Any:
    """Load a processor that also supports videos, which need torchvision, without its video processor."""

    class OfImages(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    OfImages.__name__ = kind.__name__
    settings, _ = kind.get_processor_dict(folder)
    parts = {
        "image_processor": load_image_processor,
        "tokenizer": load_tokenizer,
        "video_processor": lambda _: None,
    }
    processor = OfImages.from_args_and_dict([parts[name](folder) for name in kind.get_attributes()], settings)
    processor.video_processor = _NoVideos()
    return processor


def is_llava(config: Any) -> bool:
    """Return whether a student is a LLaVA, whose parts are called one by one, so that features can be kept."""
    return config.model_type == "llava"


def find_auto_class(config: Any) -> Any:
    """Return the auto class of transformers for a configuration: vision-language or causal; None if neither fits."""
    modeling = import_transformers().models.auto.modeling_auto
    if type(config) in modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return modeling.AutoModelForImageTextToText
    return modeling.AutoModelForCausalLM if type(config) in modeling.MODEL_FOR_CAUSAL_LM_MAPPING else None


def get_trunk(model: Any) -> Any:
    """Return the part of a model up to its last norm, whose output the head reads."""
    trunk = model.base_model
    return model.model if trunk is model else trunk  # Llama 4's decoder names its trunk by another prefix


def find_tower_class(config: Any) -> Any:
    """Return the class that transformers' AutoModel makes of a tower's configuration; None if there is none."""
    return import_transformers().MODEL_MAPPING.get(type(config), None)


def load_weights(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model with its weights. StillhouseError if they are missing or incomplete."""
    auto = find_auto_class(load_config(folder))
    options |= {"use_safetensors": True, "output_loading_info": True}  # never a pickle
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # see `is_empty_expert`
        model, info = _load("model", auto.from_pretrained, folder, **options)
    missing = sorted(name for name in info["missing_keys"] if not is_empty_expert(name, model.config))
    if missing:
        raise StillhouseError(
            f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}, which would be random; "
            "give a complete checkpoint"
        )
    return model


def load_part(kind: Any, name: str | Path, **options: Any) -> PreTrainedModel:
    """Load a tower or a decoder of a checkpoint, in the checkpoint's dtype. StillhouseError as `load_weights`.

    A tower's pooler may be missing, since no projector reads it; it is then drawn by a fixed seed.
    """
    import torch

    torch.manual_seed(0)
    options |= {"use_safetensors": True, "output_loading_info": True, "dtype": "auto"}
    model, info = _load("model", kind.from_pretrained, name, **options)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise StillhouseError(
            f"{name}: the weights lack {len(missing)} tensors, such as {missing[0]}; give a complete checkpoint"
        )
    return model


def _load(what: str, loader: Any, folder: str | Path, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return loader(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise StillhouseError(f"{folder}: its {what} cannot be read: {first_line}") from error
