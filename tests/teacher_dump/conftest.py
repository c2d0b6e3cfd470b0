"""One tiny teacher and one tiny data set for all tests of the dump."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import make_tiny_dataset, make_tiny_llava

WriteConfig = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several threads on tensors this small only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA whose head is padded beyond its tokenizer's vocabulary."""
    return make_tiny_llava(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA that ends some of its answers early."""
    folder = make_tiny_llava(tmp_path_factory.mktemp("talker"))
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.lm_head.weight.data[298] *= 4  # the end of a turn
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory, talker: Path) -> Path:
    """The talker with large rows in the padding of its head."""
    folder = shutil.copytree(talker, tmp_path_factory.mktemp("padded") / "model")
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.lm_head.weight.data[300:] *= 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSONL file of 24 samples over 8 images, two turns each."""
    return make_tiny_dataset(tmp_path_factory.mktemp("data"), num_samples=24, num_images=8, turns=2)["train"]


@pytest.fixture
def write_config(tmp_path: Path, tiny_teacher: Path, tiny_data: Path) -> WriteConfig:
    """Writes a pipeline.yaml over the tiny teacher and data; keyword arguments replace section fields."""

    def write(**sections: dict[str, Any]) -> Path:
        document: dict[str, Any] = {
            "name": "tiny",
            "runs_dir": str(tmp_path / "runs"),
            "data": {"sources": [{"path": str(tiny_data)}]},
            "teacher": {"model": str(tiny_teacher), "backend": "transformers", "max_length": 128},
            "dump": {"samples_per_part": 4},
            "cache": {"path": str(tmp_path / "cache")},
        }
        for name, fields in sections.items():
            document[name] = {**document[name], **fields}
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path

    return write
