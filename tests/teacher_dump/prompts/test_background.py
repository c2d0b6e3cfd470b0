"""`data.background` is part of a cache's identity, and must equal that of a teacher's training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.errors import ConfigError
from storage.identity import describe_differences
from storage.images.settings import PixelSettings, write_pixel_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from tests.teacher_dump.conftest import WriteConfig

TOKENS = {"families": []}


def test_another_background_is_another_cache(write_config: WriteConfig) -> None:
    white = plan_dump(read_settings(write_config(cache=TOKENS)))
    black = plan_dump(read_settings(write_config(cache=TOKENS, data={"background": "#000000"})))
    assert white.identity.pixels == PixelSettings()
    assert white.identity.image_processor is not None
    assert white.identity.image_processor["size"] == {"height": 32, "width": 32}
    fields = [line.split(":")[0] for line in describe_differences(white.identity, black.identity)]
    assert fields == ["image_preprocessing_fingerprint", "pixels.background"]
    assert black.facts.image_preprocessing_fingerprint == black.identity.image_preprocessing_fingerprint
    again = plan_dump(read_settings(write_config(cache=TOKENS)))  # now remembered in the run's folder
    assert again.identity == white.identity


def test_a_teacher_that_was_trained_on_another_background_is_refused(
    write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_teacher, tmp_path / "trained")
    write_pixel_settings(PixelSettings(background="#102030"), teacher)
    fields = {"cache": TOKENS, "teacher": {"model": str(teacher)}}
    with pytest.raises(ConfigError, match=r"data.background is #ffffff, but .*trained with #102030"):
        plan_dump(read_settings(write_config(**fields)))
    fitting = read_settings(write_config(**fields, data={"background": "#102030"}))
    assert plan_dump(fitting).identity.pixels == PixelSettings(background="#102030")


@pytest.mark.parametrize("background", ["white", "#fff", None, 0])
def test_a_background_that_is_no_colour_is_refused(write_config: WriteConfig, background: object) -> None:
    with pytest.raises(ConfigError, match=r"background"):
        read_settings(write_config(data={"background": background}))
