"""Images without files of their own, stored as bytes in a source, end to end: from the source to a trainer's pixels."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from storage.errors import StillhouseError
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from student_train.data.sample_images import open_images
from student_train.models.huggingface import load_image_processor
from teacher_dump.dump import run_dump
from teacher_dump.settings import read_settings
from tests.tiny import make_tiny_llava


def write_parquet(path: Path, num_rows: int) -> None:
    rows = []
    for number in range(num_rows):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number // 2, 9, 9)).save(file, "PNG")  # two rows share an image
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"id": number, "image": image, "question": "what colour?", "chosen": "red", "rejected": "blue"})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("families", [[], ["images"]])
def test_a_trainer_reads_images_that_were_stored_as_bytes(families: list[str], tmp_path: Path) -> None:
    teacher = make_tiny_llava(tmp_path / "teacher")
    write_parquet(tmp_path / "pairs.parquet", 6)
    document = {
        "runs_dir": str(tmp_path / "runs"),
        "data": [{"path": str(tmp_path / "pairs.parquet")}],
        "teacher": {"model": str(teacher), "backend": "transformers"},
        "dump": {"samples_per_part": 5},
        "cache": {"path": str(tmp_path / "cache"), "families": families},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    settings = read_settings(tmp_path / "pipeline.yaml")
    assert run_dump(settings, progress=False).num_samples == 12
    assert run_dump(settings, progress=False).summary is None  # nothing is read or written twice
    assert verify(tmp_path / "cache").problems == []
    cache = Cache.open(tmp_path / "cache")
    processor = load_image_processor(teacher)
    assert cache.num_parts == 3
    shades = {}
    for part in range(2):
        if part == 1:
            shutil.rmtree(tmp_path / "runs")  # the cache alone
            if "images" not in families:
                gone, image = open_images(cache, None, processor), cache.read(0).tokens.images[0]
                with pytest.raises(StillhouseError, match="cannot be read"):
                    gone.load_pixels(image, sample_id=cache.sample_ids[0], index=0)
                return
        images = open_images(cache, None, processor)
        for number, sample_id in enumerate(cache.sample_ids):
            (image,) = cache.read(number).tokens.images
            pixels = images.load_pixels(image, sample_id=sample_id, index=number).numpy()
            assert np.ptp(pixels[0]) < 1e-6
            shades.setdefault(sample_id, []).append(float(pixels[0, 0, 0]))
    assert len({one for one, _ in shades.values()}) == 3
    assert all(one == other for one, other in shades.values())
