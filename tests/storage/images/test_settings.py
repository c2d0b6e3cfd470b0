from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.errors import StillhouseError
from storage.images.settings import (
    OLD_PIXELS,
    PIXELS_FILE,
    PixelSettings,
    describe_settings_differences,
    read_pixel_settings,
    write_pixel_settings,
)


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_pixel_settings(tmp_path) is None
    for settings in (OLD_PIXELS, PixelSettings(background="#00ff7f", backend="torchvision")):
        write_pixel_settings(settings, tmp_path)
        assert read_pixel_settings(tmp_path) == settings


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"version": 99}, "version"),
        ({"background": "white"}, "background"),
        ({"gamma": 2}, "gamma"),
        ({"backend": "numpy"}, "backend"),
        (["#ffffff"], "file"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named(tmp_path: Path, document: object, said: str) -> None:
    (tmp_path / PIXELS_FILE).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(StillhouseError, match=rf"pixels\.json: {said}.*expected version 0 to"):
        read_pixel_settings(tmp_path)


@pytest.mark.parametrize("background", ["white", "#fff", "#FFFFFF", "#ffffff ", "#fffffff"])
def test_a_background_is_six_hexadecimal_digits(background: str) -> None:
    with pytest.raises(ValidationError):
        PixelSettings(background=background)


def test_only_fields_that_change_pixels_differ() -> None:
    now, black = PixelSettings(), PixelSettings(background="#000000")
    assert now.find_differences(now) == []
    assert now.find_differences(black) == [("background", "#ffffff", "#000000")]
    assert now.find_differences(OLD_PIXELS) == [("version", 1, 0)]
    assert OLD_PIXELS.find_differences(PixelSettings(version=0, background="#000000")) == []
    assert now.find_differences(PixelSettings(backend="torchvision")) == [("backend", "pil", "torchvision")]


def test_processors_are_compared_setting_by_setting() -> None:
    cache, own = {"size": {"height": 32}, "image_mean": [0.5]}, {"size": {"height": 64}, "image_mean": [0.5]}
    assert describe_settings_differences(cache, own) == [
        "image_processor.size: the cache has {'height': 32}, the student has {'height': 64}"
    ]
    assert describe_settings_differences(cache, cache) == []
