"""Pictures on a page: only the images that the teacher saw, small, and matrices in true colours."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from stillhouse.inspection.image_previews import draw_heat_map, embed_image
from storage.images.settings import PixelSettings
from storage.records.records import ImageRef

NOW = PixelSettings()


def decoded(uri: str) -> np.ndarray:
    head, content = uri.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
        return np.asarray(opened.convert("RGB"))


def reference(file: Path, root: Path, **changes: str) -> ImageRef:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    fields = {"path": file.relative_to(root).as_posix(), "sha256": sha256, **changes}
    return ImageRef(num_visual_tokens=4, key="0" * 64, **fields)


def test_a_small_image_is_embedded_to_the_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = embed_image(tmp_path, reference(tmp_path / "a.png", tmp_path), pixels=NOW)
    assert (found.width, found.height) == (30, 20)
    assert np.array_equal(decoded(found.uri), pixels)


def test_a_large_image_is_made_small(tmp_path: Path) -> None:
    Image.effect_noise((3000, 1500), 90).save(tmp_path / "a.png")
    found = embed_image(tmp_path, reference(tmp_path / "a.png", tmp_path), pixels=NOW)
    assert (found.width, found.height) == (3000, 1500)
    assert decoded(found.uri).shape == (256, 512, 3)
    assert len(found.uri) < 300_000 < (tmp_path / "a.png").stat().st_size


def test_an_image_that_cannot_be_shown_has_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    assert "leads out" in embed_image(root, reference(root / "link.png", root), pixels=NOW).reason
    (root / "text.png").write_text("<svg onload='alert(1)'/>")
    assert "is of no image format" in embed_image(root, reference(root / "text.png", root), pixels=NOW).reason
    Image.new("RGB", (8, 8)).save(root / "a.png")
    assert "another sha256" in embed_image(root, reference(root / "a.png", root, sha256="1" * 64), pixels=NOW).reason
    assert "not found below" in embed_image(root, reference(root / "a.png", root, path="b.png"), pixels=NOW).reason
    image = reference(root / "a.png", root)
    assert "8 × 8 pixels" in embed_image(root, image, max_pixels=63, pixels=NOW).reason
    assert "more than 10 bytes" in embed_image(root, image, max_file_bytes=10, pixels=NOW).reason
    assert embed_image(root, image, max_pixels=64, pixels=NOW).uri


def test_a_heat_map_has_a_pixel_a_value_and_orders_them() -> None:
    values = np.array([[0.0, 0.5], [0.5, 1.0]], np.float32)
    found = draw_heat_map(values)
    pixels = decoded(found.uri).astype(int)
    assert pixels.shape == (2, 2, 3)
    assert pixels[0, 0].sum() > pixels[0, 1].sum() > pixels[1, 1].sum()
    assert (pixels[0, 1] == pixels[1, 0]).all()
    assert (found.low, found.high, found.step) == (0, 1, 1)


def test_values_of_both_signs_are_coloured_around_zero() -> None:
    found = draw_heat_map(np.array([[-1.0, 0.0, 4.0]], np.float32))
    assert (found.low, found.high) == (-4, 4)
    red, green, blue = decoded(found.uri)[0, 1].astype(int)
    assert max(red, green, blue) - min(red, green, blue) < 8  # 0 has no colour


def test_a_constant_matrix_and_a_large_one_are_drawn() -> None:
    assert decoded(draw_heat_map(np.zeros((3, 3), np.float32)).uri).shape == (3, 3, 3)
    found = draw_heat_map(np.random.default_rng(0).random((1100, 1100)).astype(np.float32))
    assert decoded(found.uri).shape == (367, 367, 3)
    assert found.step == 3


def test_a_bright_diagonal_leaves_colours_for_the_rest() -> None:
    values = np.random.default_rng(0).random((300, 300)).astype(np.float32)
    values[range(300), range(300)] = 100
    found = draw_heat_map(values)
    assert found.clipped
    assert 0.9 < found.high <= 1
    pixels = decoded(found.uri).astype(int).sum(-1)
    assert pixels[5, 5] == pixels.min()
    assert np.corrcoef(pixels[0, 1:], values[0, 1:])[0, 1] < -0.9
    assert not draw_heat_map(np.arange(6, dtype=np.float32).reshape(2, 3)).clipped
