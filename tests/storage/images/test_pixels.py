"""Every kind of file becomes the pixels that a person sees, on a stated background, with no metadata."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from storage.images.pixels import ImageDecodeError, make_pixels, scale_to_bytes
from storage.images.settings import PixelSettings
from tests.storage.images.picture_files import (
    BACKGROUND,
    LAID,
    ORIENTATION,
    PictureFile,
    encode_image,
    make_picture_files,
    make_random_rgb,
    make_turned_file,
)

NOW = PixelSettings(background=BACKGROUND)
FILES = make_picture_files()


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_a_file_becomes_what_a_person_sees(file: PictureFile) -> None:
    picture = make_pixels(file.content, NOW)
    assert picture.mode == "RGB"
    assert picture.info == {}
    assert not picture.getexif()
    got, expected = np.asarray(picture).astype(int), file.expected.astype(int)
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= file.tolerance


@pytest.mark.parametrize("orientation", LAID)
@pytest.mark.parametrize("kind", ["jpeg", "webp", "tiff"])
def test_other_formats_name_their_orientation_too(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = (255, 0, 0), (0, 0, 255)
    got = np.asarray(make_pixels(make_turned_file(upright, orientation, kind), NOW)).astype(int)
    assert got.shape == upright.shape
    assert abs(got - upright).mean() < 25  # what JPEG loses; a wrong turn is at 50 and more


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none_is_upright(value: int) -> None:
    exif, rgb = Image.Exif(), make_random_rgb()
    exif[ORIENTATION] = value
    assert np.array_equal(np.asarray(make_pixels(encode_image(Image.fromarray(rgb), exif=exif), NOW)), rgb)


def test_broken_metadata_costs_no_picture() -> None:
    rgb = make_random_rgb()
    content = encode_image(Image.fromarray(rgb), exif=b"Exif\0\0broken and much too short")
    assert np.array_equal(np.asarray(make_pixels(content, NOW)), rgb)


def test_version_0_is_what_older_caches_were_made_with() -> None:
    rgb = make_random_rgb()
    old = make_pixels(make_turned_file(rgb, 6), PixelSettings(version=0, backend=None))
    assert np.array_equal(np.asarray(old), LAID[6](rgb))
    assert not old.getexif()


def test_hidden_pixels_do_not_tell_pictures_apart() -> None:
    """Two files that look alike become alike, whatever lies below the alpha channel; two that differ do not."""
    one, two = (np.dstack([make_random_rgb(seed=seed), np.zeros((8, 12), np.uint8)]) for seed in (1, 2))
    assert make_pixels(encode_image(Image.fromarray(one)), NOW) == make_pixels(encode_image(Image.fromarray(two)), NOW)
    drawing = np.zeros((8, 12, 4), np.uint8)
    drawing[2:4, :, 3] = 255  # black on black, which only alpha shows
    assert np.asarray(make_pixels(encode_image(Image.fromarray(drawing)), PixelSettings())).std() > 0


# Libraries of other tests may have switched this process to flush subnormal numbers to zero.
FLOATS = st.floats(width=32, allow_subnormal=False)
NUMBERS = st.sampled_from([np.uint16, np.int32, np.float32]).flatmap(
    lambda kind: arrays.arrays(kind, (3, 4), elements=None if kind != np.float32 else FLOATS)
)


@given(NUMBERS)
def test_values_that_differ_never_become_one_colour(values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        with pytest.raises(ImageDecodeError, match="no finite value"):
            scale_to_bytes(values)
        return
    scaled = scale_to_bytes(values)
    assert scaled.dtype == np.uint8
    assert scaled.shape == values.shape
    assert (scaled.min() < scaled.max()) == (finite.min() < finite.max())
    at = np.argsort(finite, kind="stable")
    assert (np.diff(scaled[np.isfinite(values)][at].astype(int)) >= 0).all()  # the order of greys stays


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [[0, 1, 255]]),
        (np.array([[0, 7, 255]], np.uint16), [[0, 7, 255]]),  # bytes in a deep file
        (np.array([[0, 40000]], np.int32), [[0, 156]]),
        (np.array([[-10, 0, 10]], np.int32), [[0, 128, 255]]),
        (np.array([[0, 0.5, 1]], np.float32), [[0, 128, 255]]),
        (np.array([[0, 1.5, 200]], np.float32), [[0, 2, 200]]),
        (np.array([[1e-4, 2e-4]], np.float32), [[0, 255]]),  # which would both be black
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [[128, 128, 128]]),
        (np.array([[5, 5]], np.int32), [[5, 5]]),
        (np.array([[-5, -5]], np.int32), [[0, 0]]),
        (np.array([[100000, 100000]], np.int32), [[255, 255]]),
    ],
)
def test_deep_values_are_scaled_by_the_stated_rule(values: np.ndarray, expected: list[list[int]]) -> None:
    assert scale_to_bytes(values).tolist() == expected


def test_a_transparent_value_of_a_deep_file_shows_the_background() -> None:
    values = np.array([[0, 65535], [30000, 12]], np.uint16)
    got = np.asarray(make_pixels(encode_image(Image.fromarray(values), transparency=65535), NOW))
    assert got.tolist() == [[[0, 0, 0], [0x30, 0x60, 0xC0]], [[117, 117, 117], [0, 0, 0]]]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_refused_without_a_memory_address(content: bytes) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        make_pixels(content, NOW)
    assert "0x" not in str(caught.value)


def test_a_truncated_file_is_refused() -> None:
    content = encode_image(Image.fromarray(make_random_rgb((64, 64))))
    for version in (0, 1):
        with pytest.raises(ImageDecodeError):
            make_pixels(content[: len(content) // 2], PixelSettings(version=version))


def test_pictures_of_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode_image(Image.new("RGB", (64, 64)))
    with pytest.raises(ImageDecodeError, match="64 × 64 pixels, more than 4,095"):
        make_pixels(content, NOW, max_pixels=4095)
    assert make_pixels(content, NOW, max_pixels=4096).size == (64, 64)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageDecodeError, match="bomb"):
        make_pixels(content, NOW)


def test_a_file_that_is_cut_inside_a_frame_that_is_not_shown_is_read() -> None:
    frames = [Image.fromarray(make_random_rgb((32, 32), seed)) for seed in range(3)]
    content = encode_image(frames[0], save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    assert np.array_equal(np.asarray(make_pixels(content[:-200], NOW)), make_random_rgb((32, 32), 0))
