"""Promise 12: teacher, student, evaluation and inspection see the same pixels, whatever the file."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.inspection.image_previews import embed_image
from storage.identity import stored_pixels
from storage.images.settings import OLD_PIXELS
from storage.reader.cache import Cache
from student_train.config import EvaluationSection, SourceSection
from student_train.data.sample_images import ImageFolder, open_images
from student_train.evaluation.model_evaluation import evaluate_model
from student_train.models.huggingface import load_image_processor
from teacher_dump.data.image_loading import load_image
from teacher_dump.prompts.processor import load_processor
from tests.stillhouse.pixel_dumps import PIXELS, dump_pictures, write_data
from tests.storage.images.picture_files import make_picture_files
from tests.teacher_dump.scorers import reference_teacher
from tests.tiny import make_tiny_llava

REPOSITORY = Path(__file__).parents[2]
LIMIT_KL = 2e-3  # nats a row, of a student that is its teacher: what rounding the rows costs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, data of every kind of picture, and a cache by the transformers backend."""
    folder = tmp_path_factory.mktemp("pixels")
    make_tiny_llava(folder / "teacher")
    write_data(folder / "data")
    dump_pictures(folder, reference_teacher(folder / "teacher"))
    return folder


def student_values(cache: Path, teacher: Path) -> dict[str, np.ndarray]:
    """What a student's loader makes of each sample's image."""
    opened = Cache.open(cache, families=())
    images = open_images(opened, None, load_image_processor(teacher))
    return {
        sample_id: images.load_pixels(opened.read(index).tokens.images[0], sample_id=sample_id, index=index).numpy()
        for index, sample_id in enumerate(opened.sample_ids)
    }


def kl_to_teacher(folder: Path, tmp_path: Path) -> float:
    """Of a student that is its own teacher."""
    model = shutil.copytree(folder / "teacher", tmp_path / "student")
    section = EvaluationSection(splits=("train",), max_new_tokens=1)
    found = evaluate_model(model, [SourceSection(path=str(folder / "cache"))], section)
    assert found["num_samples"] == len(make_picture_files())
    return found["kl_to_teacher"]


def test_teacher_and_student_make_the_same_values_of_every_file(folder: Path) -> None:
    processor, shown = load_processor(folder / "teacher"), student_values(folder / "cache", folder / "teacher")
    assert set(shown) == {file.name for file in make_picture_files()}
    for file in make_picture_files():
        pixels = load_image(folder / "data", file.name, PIXELS).pixels
        asked = processor(images=[pixels], text=["<image>"], return_tensors="pt")
        assert np.array_equal(asked["pixel_values"][0].numpy(), shown[file.name]), file.name
    assert all(np.array_equal(shown[f"exif-{number}"], shown["exif-1"]) for number in range(2, 9))


def test_inspection_shows_what_the_teacher_saw(folder: Path) -> None:
    cache = Cache.open(folder / "cache", families=())
    expected = {file.name: load_image(folder / "data", file.name, PIXELS).pixels for file in make_picture_files()}
    for index, sample_id in enumerate(cache.sample_ids):
        (image,) = cache.read(index).tokens.images
        found = embed_image(folder / "data", image, pixels=stored_pixels(cache.identity))
        assert (found.width, found.height) == expected[sample_id].size
        if max(expected[sample_id].size) <= 256:
            with Image.open(io.BytesIO(base64.b64decode(found.uri.split(",")[1]))) as shown:
                assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected[sample_id]))


def test_a_student_that_is_its_teacher_has_no_distance_over_any_picture(folder: Path, tmp_path: Path) -> None:
    assert kl_to_teacher(folder, tmp_path) < LIMIT_KL


def test_pixels_of_older_caches_are_others(folder: Path) -> None:
    """Or the test above could not fail."""
    cache = Cache.open(folder / "cache", families=())
    images = ImageFolder(folder / "data", load_image_processor(folder / "teacher"), pixels=OLD_PIXELS)
    now, differing = student_values(folder / "cache", folder / "teacher"), set()
    for index, sample_id in enumerate(cache.sample_ids):
        old = images.load_pixels(cache.read(index).tokens.images[0], sample_id=sample_id).numpy()
        if not np.array_equal(old, now[sample_id]):
            differing.add(sample_id)
    assert {"exif-6", "rgba", "16-bit", "float-tiff", "transparent-palette"} <= differing
    assert not {"exif-1", "palette", "grey", "cmyk", "tall"} & differing


@pytest.mark.slow
def test_the_engine_sees_the_students_pixels(tmp_path: Path) -> None:
    """One engine: pixel values to the bit, the vision check, and the distance of its own weights.

    In short: every dump with vLLM compares some images' values and asks about turned ones.
    """
    make_tiny_llava(tmp_path / "teacher")
    write_data(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-m", "tests.stillhouse.pixel_dumps", str(tmp_path)], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    shown = student_values(tmp_path / "cache", tmp_path / "teacher")
    with np.load(tmp_path / "pixel_values.npz") as engine:
        assert set(engine) == set(shown)
        for name, values in shown.items():
            assert np.array_equal(engine[name].reshape(values.shape), values), name
    assert kl_to_teacher(tmp_path, tmp_path) < LIMIT_KL
