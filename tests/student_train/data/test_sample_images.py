from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storage.errors import StillhouseError
from storage.images.settings import PixelSettings
from storage.reader.cache import Cache
from storage.records.records import ImageRef, TokensRecord
from storage.records.sample_batch import SampleBatch
from storage.records.sample_key import SampleKey
from student_train.data.sample_images import ImageFolder, TensorStore, VisionGatherer, open_images
from student_train.models.huggingface import load_image_processor
from tests.student_train.caches import make_cache


def picture(path: Path, shade: int) -> ImageRef:
    pixels = np.full((32, 32, 3), shade, np.uint8)
    pixels[:, :8] = 255 - shade
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return reference(path)


def reference(path: Path) -> ImageRef:
    return ImageRef(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 16, key="0" * 64)


def samples(*images: tuple[ImageRef, ...]) -> SampleBatch:
    return SampleBatch.of_tokens(
        [TokensRecord(SampleKey("s"), "", "", np.zeros(1, np.int32), np.zeros(1, bool), each) for each in images]
    )


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images", load_image_processor(checkpoint), pixels=PixelSettings())


def test_pixels_are_those_of_the_processor(folder: ImageFolder, checkpoint: Path) -> None:
    image = picture(folder.root / "a.png", 40)
    processor = load_image_processor(checkpoint)
    expected = processor(images=Image.open(folder.root / "a.png"), return_tensors="pt")["pixel_values"][0]
    got = folder.load_pixels(image, sample_id="s")
    assert got.shape == (3, 32, 32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_processor_needs_no_torchvision(checkpoint: Path) -> None:
    assert type(load_image_processor(checkpoint)).__name__ == "SiglipImageProcessorPil"


def test_another_image_of_the_same_name_is_refused(folder: ImageFolder) -> None:
    image = picture(folder.root / "a.png", 40)
    picture(folder.root / "a.png", 41)
    with pytest.raises(StillhouseError, match=r"sample 's': image .*a\.png: sha256 is .*, expected .* as in the cache"):
        folder.load_pixels(image, sample_id="s")


def test_a_missing_image_is_named(folder: ImageFolder) -> None:
    image = picture(folder.root / "a.png", 40)
    (folder.root / "a.png").unlink()
    with pytest.raises(StillhouseError, match=r"sample 's': image .*a\.png: cannot be read: No such file"):
        folder.load_pixels(image, sample_id="s")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_image_is_named(folder: ImageFolder, content: bytes) -> None:
    folder.root.mkdir()
    (folder.root / "a.png").write_bytes(content)
    with pytest.raises(StillhouseError, match=r"sample 's': image .*a\.png: cannot be decoded"):
        folder.load_pixels(reference(folder.root / "a.png"), sample_id="s")


def test_a_truncated_image_is_named(folder: ImageFolder) -> None:
    picture(folder.root / "a.png", 40)
    (folder.root / "a.png").write_bytes((folder.root / "a.png").read_bytes()[:-40])
    with pytest.raises(StillhouseError, match="cannot be decoded"):
        folder.load_pixels(reference(folder.root / "a.png"), sample_id="s")


def test_a_link_out_of_the_root_is_followed_only_in_a_local_folder(folder: ImageFolder, tmp_path: Path) -> None:
    image = picture(tmp_path / "elsewhere" / "a.png", 40)
    folder.root.mkdir()
    (folder.root / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    own = ImageFolder(folder.root, folder.processor, pixels=PixelSettings(), follows_links=False)
    with pytest.raises(StillhouseError, match="leads out of"):
        own.load_pixels(image, sample_id="s")
    assert (
        folder.load_picture(image, sample_id="s").size
        == own.load_picture(picture(folder.root / "b.png", 40), sample_id="s").size
    )


def test_a_store_keeps_the_first_tensors_within_its_bytes() -> None:
    store = TensorStore(2 * 4 * 4)
    for number in range(4):
        store.put([str(number)], [torch.full((4,), float(number))])
    assert len(store) == 2
    kept = store.get("1")
    assert kept is not None
    assert kept.tolist() == [1.0] * 4
    assert store.get("2") is None


def test_kept_features_replace_pixels(folder: ImageFolder) -> None:
    first, second = picture(folder.root / "a.png", 10), picture(folder.root / "b.png", 20)
    features = TensorStore(1 << 20)
    features.put([second.sha256], [torch.ones(16, 5)])
    source = VisionGatherer(folder, features=features, pixels=TensorStore(0))
    vision = source.gather(samples((first, second), (first,)))
    assert vision.names == (first.sha256, second.sha256, first.sha256)
    assert vision.known is not None
    assert vision.known.shape == (1, 16, 5)
    assert vision.known_slots.tolist() == [1]
    assert vision.pixel_values is not None
    assert vision.pixel_values.shape == (2, 3, 32, 32)
    assert vision.pixel_slots.tolist() == [0, 2]


def test_a_batch_without_images_gets_a_blank_one(folder: ImageFolder) -> None:
    folder.root.mkdir()
    vision = VisionGatherer(folder, features=None, pixels=TensorStore(0)).gather(samples(()))
    assert vision.names == ()
    assert vision.pixel_values is not None
    assert vision.pixel_values.shape == (1, 3, 32, 32)
    assert vision.pixel_slots.tolist() == []


def test_images_are_read_from_the_cache_if_their_folder_is_gone(tmp_path: Path, checkpoint: Path) -> None:
    path = make_cache(tmp_path, checkpoint, num_samples=4, num_images=3, families=("images",), images_per_sample=2)
    cache, processor = Cache.open(path, families=()), load_image_processor(checkpoint)
    shown = cache.read_many(range(8))

    def pixels(configured: str | None = None) -> torch.Tensor | None:
        source = VisionGatherer(open_images(cache, configured, processor), features=None, pixels=TensorStore(0))
        return source.gather(shown).pixel_values

    expected = pixels()
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    torch.testing.assert_close(pixels(), expected, rtol=0, atol=0)
    torch.testing.assert_close(pixels(str(moved)), expected, rtol=0, atol=0)
    with pytest.raises(StillhouseError, match="cannot be read"):
        pixels(str(tmp_path / "images"))  # a configured folder is meant


def test_a_cache_without_images_needs_their_folder(tmp_path: Path, checkpoint: Path) -> None:
    cache = Cache.open(make_cache(tmp_path, checkpoint, num_samples=2, families=()), families=())
    (tmp_path / "images").rename(tmp_path / "moved")
    folder = open_images(cache, None, load_image_processor(checkpoint))
    with pytest.raises(StillhouseError, match="cannot be read"):
        folder.load_pixels(cache.read(0).tokens.images[0], sample_id=cache.sample_ids[0])
