from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.errors import IdentityError
from storage.images.image_root import find_image_root, is_moved_root, may_follow_links
from storage.reader.cache import Cache
from storage.records.records import ImageRef, PartRecords, TokensRecord, compute_image_key
from storage.records.sample_key import SampleKey
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import IMAGE_TOKEN, make_identity

NEW = {"plan_fingerprint": "f" * 8, "num_parts": 1}


def write(project, name="one", **identity) -> Cache:
    """A cache of one sample with an image, in a project of its own."""
    images = project / "data/images"
    images.mkdir(parents=True, exist_ok=True)
    (images / f"{name}.png").write_bytes(b"?")
    ids = np.array([1, IMAGE_TOKEN, 20], np.int32)
    image = ImageRef(f"{name}.png", "0" * 64, 4, compute_image_key(ids[:2].tolist(), ["0" * 64], "d" * 8))
    record = TokensRecord(SampleKey(name), "train", "", ids, np.array([False, False, True]), (image,))
    chosen = make_identity(**{"num_parts": 1, "image_root": str(images), "selection": {}, **identity})
    writer = CacheWriter.open(project / "runs/x/cache", chosen, (), append=True)
    writer.write_part(0, PartRecords([record]))
    writer.seal()
    return Cache.open(project / "runs/x/cache")


def test_images_are_found_where_the_project_was_moved(tmp_path):
    assert write(tmp_path / "old").image_root == tmp_path / "old/data/images"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "old", tmp_path / "elsewhere/new")
    moved = Cache.open(tmp_path / "elsewhere/new/runs/x/cache")
    assert moved.identity.image_root == str(tmp_path / "old/data/images")
    root = moved.image_root
    assert root == tmp_path / "elsewhere/new/data/images"
    assert write(tmp_path / "elsewhere/new", "two", **NEW).image_root == root  # and the road goes on there
    shutil.rmtree(root)
    assert moved.image_root == tmp_path / "old/data/images"
    assert Cache.open(moved.folder.locate("")).image_root == root  # as the newest segment says


def test_an_image_that_is_not_there_makes_no_other_folder_the_root(tmp_path):
    cache = write(tmp_path / "old")
    (tmp_path / "old/runs/x/images").mkdir()
    (tmp_path / "old/data/images/one.png").unlink()
    assert cache.image_root == tmp_path / "old/data/images"
    assert find_image_root(["/nowhere/at/all"], "s3://bucket/cache", example=None).as_posix() == "/nowhere/at/all"


def test_samples_whose_images_lie_elsewhere_are_not_appended(tmp_path):
    write(tmp_path / "one")
    (tmp_path / "other").mkdir()
    with pytest.raises(IdentityError, match=r"image_root: cache has '.*one/data/images', this run has '.*other'"):
        write(tmp_path / "one", "two", **NEW, image_root=str(tmp_path / "other"))
    assert write(tmp_path / "one", "two", **NEW, image_root=str(tmp_path / "one/data/images")).num_samples == 2


def test_a_copied_project_keeps_its_image_root(tmp_path):
    write(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    old, cache = str(tmp_path / "one/data/images"), str(tmp_path / "copy/runs/x/cache")
    assert is_moved_root(old, str(tmp_path / "copy/data/images"), cache)
    assert not is_moved_root(old, str(tmp_path / "copy/data/pictures"), cache)
    assert is_moved_root(str(tmp_path / "gone"), "/anywhere", cache)


def test_links_lead_out_of_the_folder_that_was_dumped_alone(tmp_path: Path) -> None:
    recorded = [str(tmp_path / "data")]
    assert may_follow_links(tmp_path / "data", recorded)
    assert not may_follow_links(tmp_path / "moved/data", recorded)
