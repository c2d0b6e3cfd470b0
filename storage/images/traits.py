"""What is unusual about an image file: its pixels lie turned, some are transparent, or all are one colour."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from storage.images.pixels import Picture, has_alpha, read_orientation


@dataclass(frozen=True)
class ImageTraits:
    """What a person would want to know of an image before a teacher sees it."""

    is_constant: bool  # its pixels are one colour
    is_transparent: bool  # some of the file's pixels are not opaque
    is_turned: bool  # its EXIF says that the file's pixels are to be turned or mirrored


def read_traits(content: bytes, pixels: Picture) -> ImageTraits:
    """Traits of a file whose bytes `make_pixels` made these pixels of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            is_turned = read_orientation(image) != 1
            is_transparent = has_alpha(image) and _has_clear_pixels(image)
    is_constant = all(low == high for low, high in pixels.getextrema())  # type: ignore[misc]
    return ImageTraits(is_constant, is_transparent, is_turned)


def _has_clear_pixels(image: Image.Image) -> bool:
    clear = image.info.get("transparency")
    if image.mode.startswith(("I", "F")):
        return isinstance(clear, int) and bool((np.asarray(image) == clear).any())
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    low, _ = image.convert("RGBA").getchannel("A").getextrema()
    return float(low) < 255  # type: ignore[arg-type]
