"""Pictures that are not read from a file, and what is done to pixels after they were made."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from storage.images.pixels import ORIENTATION, Picture

_UPSIDE_DOWN = 3  # EXIF orientation: the picture lies on its head in the file


def make_blank_picture(size: tuple[int, int]) -> Picture:
    """Makes a black picture of `size` (width, height)."""
    return Image.new("RGB", size)


def make_picture(values: NDArray[np.uint8]) -> Picture:
    """Makes a picture from (h, w, 3) RGB bytes."""
    return Image.fromarray(values)


def invert_picture(picture: Picture) -> Picture:
    """Returns the picture with every channel inverted."""
    return ImageOps.invert(picture)


def resize_picture(picture: Picture, size: tuple[int, int]) -> Picture:
    """Returns the picture stretched to `size` (width, height)."""
    return picture.resize(size)


def shrink_picture(picture: Picture, max_side: int) -> Picture:
    """Returns a copy whose longer side is at most `max_side` pixels."""
    small = picture.copy()
    small.thumbnail((max_side, max_side))
    return small


def rotate_picture(picture: Picture) -> Picture:
    """Returns the picture rotated by 180 degrees."""
    return picture.transpose(Image.Transpose.ROTATE_180)


def encode_picture(picture: Picture, kind: Literal["png", "jpeg"], *, is_upside_down: bool = False) -> bytes:
    """Encodes a picture as a file's bytes; `is_upside_down` sets the EXIF orientation to 180 degrees."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"quality": 88} if kind == "jpeg" else {"compress_level": 1 if is_upside_down else 9}
    if is_upside_down:
        exif = Image.Exif()
        exif[ORIENTATION] = _UPSIDE_DOWN
        options["exif"] = exif
    picture.save(stream, kind, **options)
    return stream.getvalue()
