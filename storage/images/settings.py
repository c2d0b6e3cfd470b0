"""How pixels are made: the settings that a cache's identity and a student's checkpoint carry.

| version | what |
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

PIXEL_VERSION = 1  # that is written
PIXELS_FILE = "pixels.json"  # beside a student's weights
Background = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
WHITE = "#ffffff"
BACKEND = "pil"  # of every image processor that has it: it needs no package beyond Pillow, and runs everywhere

# Of an image processor's settings, those that change what a model sees.
_COMPARED = (
    "size", "crop_size", "max_image_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize",
    "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_image_splitting", "image_grid_pinpoints",
    "patch_size", "merge_size", "min_pixels", "max_pixels",
)  # fmt: skip


class PixelSettings(BaseModel):
    """How a file's bytes become pixels, and which library resizes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=0, le=PIXEL_VERSION)] = PIXEL_VERSION
    background: Background = WHITE  # what transparent pixels show; not used by version 0
    backend: Literal["pil", "torchvision"] | None = BACKEND  # of the image processor; None: not recorded

    def find_differences(self, other: PixelSettings) -> list[tuple[str, Any, Any]]:
        """(field, own value, the other's) of each field in which two settings make other pixels."""
        fields = ["version"]
        if self.version > 0 and other.version > 0:
            fields.append("background")
        if self.backend is not None and other.backend is not None:
            fields.append("backend")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in fields]
        return [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]


OLD_PIXELS = PixelSettings(version=0, backend=None)  # of an identity that names none


def read_processor_backend(image_processor: Any) -> Literal["pil", "torchvision"]:
    """Which library a transformers image processor resizes with; processors from before there were two use Pillow."""
    return "torchvision" if getattr(image_processor, "backend", BACKEND) == "torchvision" else "pil"


def read_processor_settings(image_processor: Any) -> dict[str, Any]:
    """What of a transformers image processor's settings changes what a model sees, as JSON has it."""
    settings = image_processor.to_dict()
    chosen = {name: settings[name] for name in _COMPARED if settings.get(name) is not None}
    return json.loads(json.dumps(chosen, default=_to_json))


def describe_settings_differences(cache: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """One line for each setting in which two image processors differ."""
    return [
        f"image_processor.{name}: the cache has {cache.get(name)}, the student {own.get(name)}"
        for name in dict.fromkeys([*cache, *own])
        if cache.get(name) != own.get(name)
    ]


def read_pixel_settings(folder: str | Path) -> PixelSettings | None:
    """The settings that a checkpoint was trained with; None where it does not say. StillhouseError: a broken file."""
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
    """Put the settings beside a checkpoint's weights."""
    (folder / PIXELS_FILE).write_text(f"{settings.model_dump_json(indent=1)}\n", encoding="utf-8")


def _to_json(value: Any) -> Any:
    """Sizes that are mappings, and enumerations."""
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if part is not None}
    return getattr(value, "value", str(value))
