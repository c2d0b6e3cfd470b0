"""Finds unusual traits of image files: rotated or transparent pixels, or a single colour."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from storage.images.pixels import Picture, has_alpha, read_orientation


@dataclass(frozen=True)
class ImageTraits:
    """Traits of an image that a person should check before the dump."""

    is_constant: bool  # all pixels have one colour
    is_transparent: bool  # some pixels are not opaque
    is_turned: bool  # EXIF requires rotating or mirroring the pixels


def read_traits(content: bytes, pixels: Picture) -> ImageTraits:
    """Returns the traits of an image file; `pixels` is the result of `make_pixels(content)`."""
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
