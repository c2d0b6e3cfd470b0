"""The one door to transformers: imported lean, with images always processed by Pillow.

transformers imports torchvision, torchaudio, scikit-learn and others wherever it finds them. The student
needs none of them: a torchvision built for another torch cannot be imported at all, torchvision and Pillow
resize images differently, and scikit-learn alone takes 1.5 s of every start. So they are hidden while
transformers is imported, and visible again afterwards; transformers remembers that they are absent.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import StillhouseError
from storage.images.settings import BACKEND, PIXELS_FILE, PixelSettings, read_pixel_settings
from student_train.template_arguments import ARGUMENTS_FILE, read_template_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN = ("torchvision", "torchaudio", "torchcodec", "sklearn", "scipy", "pandas", "librosa", "soundfile")
_PROBES = (  # transformers.utils functions that look for a hidden package, and remember what they saw
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
def hidden(packages: tuple[str, ...] = HIDDEN) -> Iterator[None]:
    """Within it, packages that are not imported yet look as if they were not installed."""
    masked = [name for name in packages if name not in sys.modules]
    for name in masked:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to bar an import
    try:
        yield
    finally:
        for name in masked:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def transformers_module() -> Any:
    """The transformers package, its logs quiet, its classes imported without optional packages."""
    loaded = sys.modules.get("transformers.generation.candidate_generator") is not None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with hidden():
        module = importlib.import_module("transformers")
        if not loaded:
            availability = importlib.import_module("transformers.utils.import_utils")
            for probe in _PROBES:
                getattr(availability, probe, bool)()
            importlib.import_module("transformers.models.auto.modeling_auto")
            importlib.import_module("transformers.models.llava.modeling_llava")
    module.logging.disable_progress_bar()
    return module


def holds_nothing(name: str, config: Any) -> bool:
    """Whether a parameter belongs to a shared expert of no width, so that it neither is saved nor may be missed."""
    text = getattr(config, "text_config", config)
    return ".shared_expert" in name and getattr(text, "shared_expert_intermediate_size", None) == 0


def load_config(folder: str | Path) -> Any:
    """A checkpoint's configuration. StillhouseError if there is no readable one."""
    return _load("configuration", transformers_module().AutoConfig.from_pretrained, folder)


def load_tokenizer(folder: str | Path) -> Any:
    """A checkpoint's tokenizer. StillhouseError if there is no readable one."""
    return _load("tokenizer", transformers_module().AutoTokenizer.from_pretrained, folder)


def load_image_processor(folder: str | Path) -> Any:
    """A checkpoint's image processor on Pillow. StillhouseError if there is no readable one."""
    return _load("image processor", transformers_module().AutoImageProcessor.from_pretrained, folder, backend=BACKEND)


def load_pixel_settings(folder: str | Path) -> PixelSettings | None:
    """The pixels that a checkpoint was trained with, None where it does not say. StillhouseError: a broken file."""
    place = _folder_with(folder, PIXELS_FILE)
    return None if place is None else read_pixel_settings(place)


def load_template_arguments(folder: str | Path) -> dict[str, Any]:
    """The chat template's arguments that a checkpoint was trained with. StillhouseError: a broken file."""
    place = _folder_with(folder, ARGUMENTS_FILE)
    return {} if place is None else read_template_arguments(place)


def _folder_with(folder: str | Path, name: str) -> Path | None:
    """The local folder of a checkpoint's optional file; None for a hub id whose repository has no such file."""
    if Path(folder).is_dir():
        return Path(folder)
    file = transformers_module().utils.cached_file(  # the files of a hub id are fetched one by one
        str(folder),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file).parent


def load_processor(folder: str | Path) -> Any:
    """A checkpoint's processor (chat template, tokenizer, images, but no videos). StillhouseError if it has none."""
    try:
        kind = _processor_class(load_config(folder))
    except StillhouseError:  # a folder of a processor alone has no config.json
        kind = None
    if kind is None or "video_processor" not in kind.get_attributes():
        return _load("processor", transformers_module().AutoProcessor.from_pretrained, folder, backend=BACKEND)
    return _load("processor", lambda place: _without_videos(kind, place), folder)


def _processor_class(config: Any) -> Any:
    transformers_module()
    classes = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING
    return classes.get(type(config), None)


class _NoVideos:
    """Stands where a processor has its video processor: of its settings some are read though no video comes."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _without_videos(kind: Any, folder: str) -> Any:
    """A processor that would also take videos, which asks for torchvision, with nothing in that place."""

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
    """Whether a student is driven part by part, so that a frozen tower's features can be kept."""
    return config.model_type == "llava"


def auto_model(config: Any) -> Any:
    """The class of transformers that makes the model of a configuration; None if neither kind knows it."""
    modeling = transformers_module().models.auto.modeling_auto
    if type(config) in modeling.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return modeling.AutoModelForImageTextToText
    return modeling.AutoModelForCausalLM if type(config) in modeling.MODEL_FOR_CAUSAL_LM_MAPPING else None


def load_weights(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model with its weights. StillhouseError if they are missing or do not fill the model."""
    auto = auto_model(load_config(folder))
    options |= {"use_safetensors": True, "output_loading_info": True}  # never a pickle
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # see `holds_nothing`
        model, info = _load("model", auto.from_pretrained, folder, **options)
    missing = sorted(name for name in info["missing_keys"] if not holds_nothing(name, model.config))
    if missing:
        raise StillhouseError(
            f"{folder}: the weights lack {len(missing)} tensors, such as {missing[0]}, and random ones would "
            "stand in for them; give a complete checkpoint"
        )
    return model


def load_part(kind: Any, name: str | Path, **options: Any) -> PreTrainedModel:
    """A tower or a decoder of a checkpoint, in the checkpoint's own dtype. StillhouseError as `load_weights`."""
    options |= {"use_safetensors": True, "output_loading_info": True, "dtype": "auto"}
    model, info = _load("model", kind.from_pretrained, name, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise StillhouseError(f"{name}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def _load(what: str, loader: Any, folder: str | Path, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return loader(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise StillhouseError(f"{folder}: no {what} can be read from it: {first_line}") from error
