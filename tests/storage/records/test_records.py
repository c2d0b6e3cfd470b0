import numpy as np
import pytest

from storage.records.records import ImageRef, check_image_path, compute_image_key

SHA = "0" * 64


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/etc/passwd",
        "..",
        "../x.png",
        "a/../../x.png",
        "a/..",
        "C:/x.png",
        "c:x",
        "a\\..\\x.png",
        "a\0.png",
    ],
)
def test_image_paths_outside_of_their_root_are_refused(path):
    with pytest.raises(ValueError, match="image path"):
        check_image_path(path)
    with pytest.raises(ValueError, match="image path"):
        ImageRef(path, SHA, 1, SHA)


@pytest.mark.parametrize("path", ["x.png", "coco/train2017/0001.jpg", "a..b/c.png", "…/ä ö.png", ".hidden/x"])
def test_image_paths_inside_their_root_are_kept(path, tmp_path):
    assert check_image_path(path) == path
    assert ImageRef(path, SHA, 1, SHA).file(tmp_path).is_relative_to(tmp_path)


@pytest.mark.parametrize(("sha256", "key"), [("0" * 63, SHA), (SHA, "G" * 64), (SHA, ""), (SHA.upper() + "A", SHA)])
def test_malformed_hashes_are_refused(sha256, key):
    with pytest.raises(ValueError, match="64 hex digits"):
        ImageRef("x.png", sha256, 1, key)


def test_an_image_has_visual_tokens():
    with pytest.raises(ValueError, match="visual tokens"):
        ImageRef("x.png", SHA, 0, SHA)


def test_image_key_depends_on_each_of_its_inputs():
    a, b = "a" * 64, "b" * 64
    keys = [
        compute_image_key([1, 7], [a], "p"),
        compute_image_key([1, 8], [a], "p"),
        compute_image_key([1, 7, 7], [a], "p"),
        compute_image_key([1, 7], [b], "p"),
        compute_image_key([1, 7], [a, b], "p"),
        compute_image_key([1, 7], [b, a], "p"),
        compute_image_key([1, 7], [a], "q"),
    ]
    assert len(set(keys)) == len(keys)


def test_image_key_is_the_same_for_lists_and_arrays_and_for_ever():
    key = compute_image_key([1, 7], ["a" * 64], "p")
    assert key == compute_image_key(np.array([1, 7], np.int32), ["a" * 64], "p")
    assert key == "29c11d39c9883592048120061819581ab4422410f4fe3e51b50e21d20523466c"
