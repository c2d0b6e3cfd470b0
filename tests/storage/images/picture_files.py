"""Files of every kind of pixels that data sets hold, and what a model should see of each."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

BACKGROUND = "#3060c0"
BACKGROUND_RGB = (0x30, 0x60, 0xC0)
SIZE = (12, 8)  # width, height: not square, so that a turn shows
ORIENTATION = 0x0112
# What turns the upright pixels into those that lie in a file of this EXIF orientation, on (h, w, c) arrays.
LAID: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A file's bytes, and the pixels that it should become on BACKGROUND."""

    name: str
    content: bytes
    expected: np.ndarray  # (h, w, 3) uint8
    tolerance: int = 0  # of a channel


def encode_image(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def make_random_rgb(size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """(h, w, 3), smooth enough for JPEG: 2 x 2 blocks of one colour."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, ((size[1] + 1) // 2, (size[0] + 1) // 2, 3), dtype=np.uint8)
    return blocks.repeat(2, 0).repeat(2, 1)[: size[1], : size[0]]


def make_turned_file(upright: np.ndarray, orientation: int, kind: str = "png") -> bytes:
    """A file that holds the pixels turned and says how."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    laid = np.ascontiguousarray(LAID[orientation](upright))
    return encode_image(Image.fromarray(laid), kind, exif=exif)


def flatten_by_hand(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """By hand, in floats."""
    weight = alpha[..., None] / 255
    return np.rint(rgb * weight + np.array(BACKGROUND_RGB) * (1 - weight)).astype(np.uint8)


def make_picture_files() -> list[PictureFile]:
    """One for each kind."""
    rgb, draw = make_random_rgb(), np.random.default_rng(1)
    height, width = rgb.shape[:2]
    grey = rgb[..., 0]
    grey_rgb = np.repeat(grey[..., None], 3, 2)
    alpha = draw.choice(np.array([0, 255, 90], np.uint8), (height, width))
    ramp = np.linspace(0, 1, height * width).reshape(height, width)
    ramp_rgb = np.repeat(np.rint(ramp * 255).astype(np.uint8)[..., None], 3, 2)
    files = [PictureFile(f"exif-{number}", make_turned_file(rgb, number), rgb) for number in LAID]
    hidden = Image.fromarray(np.dstack([rgb, alpha]))
    palette = Image.fromarray(rgb).quantize(16)
    seen = np.asarray(palette.convert("RGB"))
    clear = np.asarray(palette) == 3
    key = Image.fromarray(rgb)
    first = tuple(int(value) for value in rgb[0, 0])
    other = np.zeros_like(rgb)
    deep = np.rint(ramp * 65535).astype(np.uint16)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    grey_alpha = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    bits = grey > 128

    def on_background(is_clear: np.ndarray, shown: np.ndarray) -> np.ndarray:
        return np.where(is_clear[..., None], np.array(BACKGROUND_RGB, np.uint8), shown)

    def file(name: str, image: Image.Image, expected: np.ndarray, kind: str = "png", **options: object) -> PictureFile:
        return PictureFile(name, encode_image(image, kind, **options), expected)

    is_first, is_dark, dark = (rgb == rgb[0, 0]).all(-1), grey == grey[0, 0], int(grey[0, 0])
    from_array = Image.fromarray
    files += [
        PictureFile("rgba", encode_image(hidden), flatten_by_hand(rgb, alpha), 1),
        PictureFile(
            "rgba-webp", encode_image(hidden, "webp", lossless=True, exact=True), flatten_by_hand(rgb, alpha), 1
        ),
        PictureFile("la", encode_image(grey_alpha), flatten_by_hand(grey_rgb, alpha), 1),
        file("transparent-palette", palette, on_background(clear, seen), transparency=3),
        file("transparent-colour", key, on_background(is_first, rgb), transparency=first),
        file("transparent-grey", from_array(grey), on_background(is_dark, grey_rgb), transparency=dark),
        file("palette", palette, seen),
        file("grey", from_array(grey), grey_rgb),
        file("bits", from_array(bits), np.repeat(np.where(bits, np.uint8(255), np.uint8(0))[..., None], 3, 2)),
        file("16-bit", from_array(deep), ramp_rgb),
        file("16-bit-tiff", from_array(deep), ramp_rgb, "tiff"),
        file("32-bit-tiff", from_array(deep.astype(np.int32)), ramp_rgb, "tiff"),
        file("float-tiff", from_array(ramp.astype(np.float32)), ramp_rgb, "tiff"),
        file("float-of-bytes", from_array((ramp * 255).astype(np.float32)), ramp_rgb, "tiff"),
        file("float-wide", from_array((ramp * 7e4 - 3e4).astype(np.float32)), ramp_rgb, "tiff"),
        file("cmyk", cmyk, np.asarray(cmyk.convert("RGB")), "tiff"),
        file("one-pixel", from_array(rgb[:1, :1].copy()), rgb[:1, :1]),
        file("tall", from_array(make_random_rgb((1, 2000))), make_random_rgb((1, 2000))),
        file("wide", from_array(make_random_rgb((2000, 1))), make_random_rgb((2000, 1))),
        file("three-rows", from_array(make_random_rgb((5, 3))), make_random_rgb((5, 3))),
        file("animated", key, rgb, save_all=True, append_images=[from_array(other)]),
        file("animated-gif", palette, seen, "gif", save_all=True, append_images=[palette.point(lambda _: 0)]),
    ]
    return files
