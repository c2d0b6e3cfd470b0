from __future__ import annotations

import hashlib
import os
from pathlib import Path

import PIL.Image
import pytest
from PIL import Image

from storage.images.settings import PixelSettings
from teacher_dump.data.image_loading import load_image
from teacher_dump.data.sample import SampleRefusedError


def test_pixels_are_rgb_and_the_hash_is_of_the_file(tmp_path: Path) -> None:
    Image.new("LA", (3, 2), (128, 0)).save(tmp_path / "grey.png")
    image = load_image(tmp_path, "grey.png", PixelSettings())
    assert (image.pixels.mode, image.pixels.size) == ("RGB", (3, 2))
    assert image.content == (tmp_path / "grey.png").read_bytes()
    assert image.sha256 == hashlib.sha256(image.content).hexdigest()


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_bytes(b"no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("short.png", "text.png", "empty.png"):
        with pytest.raises(SampleRefusedError, match=f"{name}.*cannot be decoded"):
            load_image(tmp_path, name, PixelSettings())
    with pytest.raises(SampleRefusedError, match="cannot be read"):
        load_image(tmp_path, "gone.png", PixelSettings())


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleRefusedError, match="bomb"):
        load_image(tmp_path, "bomb.png", PixelSettings())


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "folder/../../secret.png"])
def test_an_image_outside_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "root/folder").mkdir(parents=True)
    with pytest.raises(SampleRefusedError, match="outside"):
        load_image(tmp_path / "root", path, PixelSettings())


def test_a_link_below_the_root_is_followed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "root/folder").symlink_to(tmp_path)
    contents = [load_image(tmp_path / "root", path, PixelSettings()).content for path in ("link.png", "folder/a.png")]
    assert contents == [(tmp_path / "a.png").read_bytes()] * 2


def test_special_and_huge_files_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for a writer
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room
    for name, said in (("pipe.png", "no such file"), ("huge.png", "10,737,418,240 bytes")):
        with pytest.raises(SampleRefusedError, match=said):
            load_image(tmp_path, name, PixelSettings())
