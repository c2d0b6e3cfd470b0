"""Loads an image file below the image root: its bytes, content hash and pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from storage.images.pixels import ImageDecodeError, Picture, make_pixels
from storage.images.settings import PixelSettings
from storage.records.records import check_image_path
from teacher_dump.data.sample import SampleRefusedError

MAX_IMAGE_BYTES = 256 * 2**20  # of a file; an image of as many pixels as Pillow trusts is smaller


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A decoded image."""

    path: str  # relative to the image root
    sha256: str  # of the file's bytes
    pixels: Picture
    content: bytes  # of the file


def load_image(root: Path, path: str, settings: PixelSettings) -> LoadedImage:
    """Reads and decodes one image.

    Raises SampleRefusedError if it lies outside the root, cannot be read or decoded, or is too large.
    The root is a folder of this machine, so links below it are followed wherever they lead.
    """
    try:
        check_image_path(path)
    except ValueError as error:
        raise SampleRefusedError(f"image {path!r} lies outside of {root}: {error}") from error
    try:
        file = root / path
        if not file.is_file():  # reading a pipe would block
            raise SampleRefusedError(f"image {path!r}: cannot be read: there is no such file")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise SampleRefusedError(
                f"image {path!r}: has {file.stat().st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}"
            )
        content = file.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise SampleRefusedError(f"image {path!r}: cannot be read: {error}") from error
    try:
        pixels = make_pixels(content, settings)
    except ImageDecodeError as error:
        raise SampleRefusedError(f"image {path!r}: cannot be decoded: {error}") from error
    return LoadedImage(path, hashlib.sha256(content).hexdigest(), pixels, content)
