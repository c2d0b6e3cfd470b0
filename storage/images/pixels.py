"""Decodes an image file's bytes into RGB pixels; the only path by which an image reaches a model or a page.

Conversion by mode (version 1 of the pixels; version 0 is only Pillow's `convert("RGB")`):

- orientation: EXIF (or XMP) 2 to 8 is applied; one that cannot be read is taken for upright;
- 1, L, RGB, P, CMYK, YCbCr, HSV: Pillow's conversion. Of 16-bit colour Pillow keeps the high byte of each channel;
- alpha (LA, La, PA, RGBA, RGBa, a palette's transparency, a transparent colour): flattened on the background;
- I;16, I: values up to 255 are kept, values up to 65,535 divided by 257, any other range is stretched from its
  minimum to its maximum;
- F: values in 0 to 1 are multiplied by 255, values up to 255 are kept, any other range is stretched. What is not
  finite becomes the nearest end of the range;
- never one colour where the file has several grey values: such a range is stretched, too;
- of an animation the first frame. Metadata is not handed on.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.errors import StillhouseError
from storage.images.settings import PixelSettings

Picture = Image.Image  # RGB, 8 bits a channel, no metadata

ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP = ("I", "F")  # and I;16 with any byte order


class ImageDecodeError(StillhouseError):
    """The bytes are not an image, are damaged, or hold more pixels than allowed."""


def make_pixels(content: bytes, settings: PixelSettings, *, max_pixels: int | None = None) -> Picture:
    """Decodes an image file's bytes into RGB pixels.

    Limits: Pillow's own against decompression bombs (about 179 million pixels), and `max_pixels` if given.
    Errors: ImageDecodeError with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palettes, odd metadata, and bombs below the limit
            with Image.open(io.BytesIO(content)) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise ImageDecodeError(f"has {image.width} × {image.height} pixels, more than {max_pixels:,}")
                if settings.version == 0:
                    return _copy_pixels(image.convert("RGB"))
                image.load()  # some formats name orientation or transparency behind the pixels
                return _copy_pixels(
                    _apply_orientation(_flatten_alpha(image, settings.background), read_orientation(image))
                )
    except ImageDecodeError:
        raise
    except UnidentifiedImageError as error:  # whose own message holds a memory address
        raise ImageDecodeError("is of no image format") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        raise ImageDecodeError(str(error) or type(error).__name__) from error


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if it cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata of a good picture
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _apply_orientation(picture: Picture, orientation: int) -> Picture:
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def _flatten_alpha(image: Image.Image, background: str) -> Picture:
    """Converts an image to RGB, with transparent pixels composited on the background."""
    if image.mode.startswith("I;16") or image.mode in _DEEP:
        return _convert_grey(image, background)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if not has_alpha(image):
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, background), seen).convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Returns True if an opened image may have transparent pixels."""
    has_palette_alpha = image.palette is not None and image.palette.mode.endswith("A")
    bands = [band.upper() for band in image.getbands()]
    return "A" in bands or "transparency" in image.info or has_palette_alpha


def _convert_grey(image: Image.Image, background: str) -> Picture:
    """Converts one channel of more than 8 bits to RGB; a transparent value becomes the background."""
    values = np.asarray(image)
    shown = Image.fromarray(scale_to_bytes(values)).convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        mask = Image.fromarray(np.where(values == clear, np.uint8(255), np.uint8(0)))
        shown.paste(Image.new("RGB", shown.size, background), mask=mask)
    return shown


def scale_to_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scales integers or floats of any range to 0..255; the module's docstring has the rule.

    Errors: ImageDecodeError if no value is finite.
    """
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float:
        finite = np.isfinite(values)
        if not finite.any():
            raise ImageDecodeError("has no finite value")
        low, high = float(values[finite].min()), float(values[finite].max())
        values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    else:
        low, high = float(values.min()), float(values.max())
    stretched = low, (255 / (high - low) if high > low else 0.0)
    if low < 0 or high > (255 if is_float else 65535):
        start, factor = stretched if high > low else (0.0, 0.0 if high <= 0 else 255 / high)
    elif is_float and high <= 1:
        start, factor = 0.0, 255.0
    else:
        start, factor = 0.0, 1.0 if high <= 255 else 1 / 257
    if high > low and round((low - start) * factor) == round((high - start) * factor):
        start, factor = stretched
    scaled = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), _ROWS_AT_ONCE):  # or a large picture takes eight times its memory
        piece = values[rows : rows + _ROWS_AT_ONCE].astype(np.float64)
        scaled[rows : rows + _ROWS_AT_ONCE] = np.clip(np.rint((piece - start) * factor), 0, 255)
    return scaled


_ROWS_AT_ONCE = 256


def _copy_pixels(picture: Image.Image) -> Picture:
    """Returns a copy of the pixels without metadata."""
    alone = Image.new("RGB", picture.size)
    alone.paste(picture)
    return alone
