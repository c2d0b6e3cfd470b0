from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.images.pixels import make_pixels
from storage.images.settings import PixelSettings
from storage.images.traits import ImageTraits, read_traits
from storage.records.records import SampleError, TokensRecord
from storage.records.sample_key import SampleKey
from teacher_dump.data.conversation import NO_LABEL
from teacher_dump.data.image_loading import LoadedImage, load_image
from teacher_dump.prompts.data_report import DataReporter
from teacher_dump.prompts.image_tokens import expand_image_tokens
from teacher_dump.prompts.preparation import PreparedSample

PLAIN = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def clear(mode: str, alpha: int) -> Image.Image:
    image = Image.fromarray(PLAIN).convert("RGBA")
    image.putpixel((1, 1), (9, 9, 9, alpha))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("content", "traits"),
    [
        (saved(Image.fromarray(PLAIN)), ImageTraits(False, False, False)),
        (saved(Image.fromarray(PLAIN), "JPEG", exif=with_orientation(6)), ImageTraits(False, False, True)),
        (saved(Image.fromarray(PLAIN), "JPEG", exif=with_orientation(1)), ImageTraits(False, False, False)),
        (saved(Image.new("RGB", (4, 4), "red")), ImageTraits(True, False, False)),
        (saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), ImageTraits(True, True, False)),
        (saved(clear("RGBA", 254)), ImageTraits(False, True, False)),
        (saved(clear("RGBA", 255)), ImageTraits(False, False, False)),
        (saved(clear("LA", 0)), ImageTraits(False, True, False)),
        (saved(clear("RGBA", 0), "GIF"), ImageTraits(False, True, False)),
        (saved(Image.fromarray(PLAIN[..., 0].astype(np.uint16) * 200)), ImageTraits(False, False, False)),
    ],
)
def test_traits_of_a_file(content: bytes, traits: ImageTraits) -> None:
    assert read_traits(content, make_pixels(content, PixelSettings())) == traits


def prepared(name: str, images: list[LoadedImage], *, is_cut: bool = False) -> PreparedSample:
    ids, mask = np.arange(3, dtype=np.int32), np.array([False, True, True])
    record = TokensRecord(SampleKey(name), "train", "", ids, mask, ())
    return PreparedSample(record, tuple(images), expand_image_tokens(ids, [], -1), is_cut)


def test_a_report_counts_each_image_once_and_names_the_first_three(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    Image.fromarray(PLAIN).save(tmp_path / "turned.jpg", exif=with_orientation(8))
    names = [*(f"{number}.png" for number in range(5)), "copy.png", "turned.jpg"]
    images = [load_image(tmp_path, name, PixelSettings()) for name in names]
    watch = DataReporter()
    watch.add(prepared("a", images))
    watch.add(prepared("b", images[:2], is_cut=True))
    watch.add_errors([SampleError("c", "rows:1: row is int"), SampleError("d", f"rows:2: {NO_LABEL}")])
    assert watch.report.format_lines() == [
        "data: 6 of 7 images are of one colour: 0.png, 1.png, 2.png, …",
        "data: 1 of 7 images are identical to another of a different name: copy.png = 0.png",
        "data: 1 of 7 images are turned by their EXIF orientation: turned.jpg",
        "data: 1 of 4 samples have no label: d",
        "data: 1 of 4 samples are cut at the maximal length: b",
        "data: 1 of 4 samples are refused: c",
        "data: 4 samples, 7 images: no image is transparent",
    ]


def test_a_clean_data_set_is_reported_clean(tmp_path: Path) -> None:
    Image.fromarray(PLAIN).save(tmp_path / "a.png")
    watch = DataReporter()
    watch.add(prepared("a", [load_image(tmp_path, "a.png", PixelSettings())]))
    (line,) = watch.report.format_lines()
    assert line.startswith("data: 1 samples, 1 images: no image is constant, no image is identical, ")
