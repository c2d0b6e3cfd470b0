"""From a TinyLLaVA's file list to a dump, and to a student that fits the cache: 15 visual tokens of 16 everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from stillhouse.conversion.convert import convert
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from student_train.data.collate import check_visual_grid
from student_train.models.loading import check_fit, read_checkpoint
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.stillhouse.conversion import foreign_checkpoints as foreign
from tests.tiny import make_tiny_dataset


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a converted TinyLLaVA in `model` and, in `cache`, what it taught through transformers."""
    folder = tmp_path_factory.mktemp("teaching")
    (folder / "source").mkdir()
    foreign.make_tinyllava(folder / "source", parts=True)
    convert(folder / "source", folder / "model")
    data = make_tiny_dataset(folder / "data", num_samples=4, num_images=2)["train"]
    document = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"path": str(data)}]},
        "teacher": {"model": str(folder / "model"), "backend": "transformers", "max_length": 400},
        "dump": {"samples_per_part": 4},
        "cache": {"path": str(folder / "cache"), "families": ["response", "visual", "relation"]},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document))
    settings = read_settings(folder / "pipeline.yaml")
    planned = plan_dump(settings)
    writer = CacheWriter.open(settings.cache.path, planned.identity, settings.cache.families)
    worker = Worker(make_worker_settings(planned, settings))
    for part in planned.plan.parts:
        worker.run(part)
    writer.seal()
    return folder


def test_the_cache_holds_the_text_and_the_tokens_of_the_source(taught: Path) -> None:
    assert verify(taught / "cache").problems == []
    tokenizer = read_checkpoint(taught / "model").tokenizer
    record = Cache.open(taught / "cache").read(0)
    ids = record.tokens.token_ids
    assert int(np.count_nonzero(ids == 300)) == 1  # a placeholder for all of an image's
    assert [image.num_visual_tokens for image in record.tokens.images] == [15]
    text = tokenizer.decode(ids)
    assert " USER: <image>\nwhat colour is the left half? ASSISTANT: " in text
    answer = tokenizer.decode(ids[record.tokens.response_mask])
    assert answer.startswith(" ")  # of the answer, since a prompt ends with "ASSISTANT:"
    assert answer.endswith("<|endoftext|>")
    (matrix,) = record.relation.values()
    assert matrix.values.shape == (15, 15)
    assert record.visual


def test_the_model_itself_fits_the_cache_as_a_student(taught: Path) -> None:
    checkpoint, cache = read_checkpoint(taught / "model"), Cache.open(taught / "cache")
    assert check_fit(checkpoint, cache.identity) == ()
    (image,) = cache.read(0).tokens.images
    check_visual_grid(image, "0", checkpoint.sequence_format)
