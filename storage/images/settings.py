"""The settings for making pixels, recorded in a cache's identity and in a student's checkpoint.

| version | meaning |
|---|---|
| 0 | Pillow's `convert("RGB")`: EXIF is ignored, hidden pixels show; no dump writes it, tests compare with it |
| 1 | orientation applied, 16-bit and float values scaled, alpha flattened on the background, no metadata |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import StillhouseError

PIXEL_VERSION = 1  # the version that is written
PIXELS_FILE = "pixels.json"  # beside a student's weights
Background = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
WHITE = "#ffffff"
BACKEND = "pil"  # used if an image processor supports it: needs only Pillow and runs everywhere

# The settings of an image processor that change what a model sees.
_COMPARED = (
    "size", "crop_size", "max_image_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize",
    "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_image_splitting", "image_grid_pinpoints",
    "patch_size", "merge_size", "min_pixels", "max_pixels",
)  # fmt: skip


class PixelSettings(BaseModel):
    """The settings that turn a file's bytes into pixels, and the library that resizes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=0, le=PIXEL_VERSION)] = PIXEL_VERSION
    background: Background = WHITE  # what transparent pixels show; not used by version 0
    backend: Literal["pil", "torchvision"] | None = BACKEND  # of the image processor; None: not recorded

    def find_differences(self, other: PixelSettings) -> list[tuple[str, Any, Any]]:
        """Returns (field, own value, other value) for each field in which the resulting pixels differ."""
        fields = ["version"]
        if self.version > 0 and other.version > 0:
            fields.append("background")
        if self.backend is not None and other.backend is not None:
            fields.append("backend")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in fields]
        return [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]


OLD_PIXELS = PixelSettings(version=0, backend=None)  # for an identity that records none


def read_processor_backend(image_processor: Any) -> Literal["pil", "torchvision"]:
    """Returns the library that a transformers image processor resizes with; old processors use Pillow."""
    return "torchvision" if getattr(image_processor, "backend", BACKEND) == "torchvision" else "pil"


def read_processor_settings(image_processor: Any) -> dict[str, Any]:
    """Returns the settings of a transformers image processor that change what a model sees, as JSON values."""
    settings = image_processor.to_dict()
    chosen = {name: settings[name] for name in _COMPARED if settings.get(name) is not None}
    return json.loads(json.dumps(chosen, default=_to_json))


def describe_settings_differences(cache: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Returns one line per setting in which two image processors differ."""
    return [
        f"image_processor.{name}: the cache has {cache.get(name)}, the student has {own.get(name)}"
        for name in dict.fromkeys([*cache, *own])
        if cache.get(name) != own.get(name)
    ]


def read_pixel_settings(folder: str | Path) -> PixelSettings | None:
    """Reads the settings that a checkpoint was trained with; None if not recorded.

    Errors: StillhouseError for a file that cannot be read or is invalid.
    """
    path = Path(folder) / PIXELS_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StillhouseError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return PixelSettings.model_validate_json(content)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors())
        raise StillhouseError(
            f"{path}: {found}; expected version 0 to {PIXEL_VERSION}, background like {WHITE} and backend; "
            "a newer Stillhouse may have written it"
        ) from error


def write_pixel_settings(settings: PixelSettings, folder: Path) -> None:
    """Writes the settings beside a checkpoint's weights."""
    (folder / PIXELS_FILE).write_text(f"{settings.model_dump_json(indent=1)}\n", encoding="utf-8")


def _to_json(value: Any) -> Any:
    """Converts sizes (mappings) and enumerations to JSON values."""
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if part is not None}
    return getattr(value, "value", str(value))
