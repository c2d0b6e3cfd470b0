"""`stillhouse check` of a recipe on an empty machine: one list of everything to get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.check import check_experiment
from stillhouse.config import read_experiment
from stillhouse.published.models import load_published_models
from storage.errors import ConfigError
from student_train.models.loading import is_hub_id
from tests.tiny import make_tiny_dataset, make_tiny_llava

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def list_missing(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        list(check_experiment(read_experiment(path, overrides)))
    return str(refused.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_without_data_lists_every_input_at_once(path: Path, tmp_path: Path) -> None:
    experiment = read_experiment(path)
    listed = list_missing(path, f"runs_dir={tmp_path}")
    for source in experiment.data.sources:
        assert f"  {source.path}: {source.dataset} [" in listed
    hub = {experiment.teacher.model, *(stage.init for stage in experiment.stages.values())}
    hub |= {part for stage in experiment.stages.values() if (c := stage.compose) for part in (c.vision, c.llm)}
    for name in filter(is_hub_id, hub - {stage.output for stage in experiment.stages.values()}):
        if name.startswith("runs/"):
            continue
        model = load_published_models()[name]  # every model that a recipe names is in the table
        (line,) = [line for line in listed.splitlines() if line.startswith(f"  {name}: ")]
        assert f"{model.gigabytes:g} GB" in line
        assert f"licence: {model.licence}" in line
    if experiment.teacher.recipe is not None:
        assert "teacher.model, stages." in listed
        assert f"{experiment.teacher.model}, which {path.parent / experiment.teacher.recipe} makes" in listed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = make_tiny_dataset(tmp_path, num_samples=2, num_images=1)
    make_tiny_llava(tmp_path / "teacher", num_layers=1)
    document: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(data["train"]), "images": str(tmp_path)}]},
        "teacher": {"model": str(tmp_path / "teacher"), "dtype": "float32", "max_length": 128},
        "stages": {"kd": {"init": str(tmp_path / "teacher"), "steps": 1}},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_only_what_is_missing_is_listed(file: Path) -> None:
    sources = [
        *json.loads(json.dumps(yaml.safe_load(file.read_text())["data"]["sources"])),
        {"path": "/nowhere/a.json", "images": "/nowhere/images", "dataset": "A & B"},
        {"path": "/nowhere/*.parquet"},
    ]
    listed = list_missing(
        file, f"data.sources={json.dumps(sources)}", "stages.kd.init=owner/name", "teacher.model=/nowhere"
    )
    assert listed.splitlines()[0] == f"{file}: 4 inputs are missing"
    assert "  /nowhere/a.json: A & B [data.sources.1]" in listed
    assert "  /nowhere/images: images of A & B [data.sources.1.images]" in listed
    assert "  /nowhere/*.parquet: no name is given (data.sources.N.dataset) [data.sources.2]" in listed
    assert "  teacher.model is /nowhere, which is neither a folder nor a Hub id" in listed
    assert "  owner/name: size and licence are not known to this version [stages.kd.init]" in listed
    assert "data.sources.0" not in listed


def test_a_hub_model_alone_is_told_and_no_mistake(file: Path) -> None:
    lines = list(check_experiment(read_experiment(file, ["stages.kd.init=Qwen/Qwen2.5-VL-3B-Instruct"])))
    assert lines[1].startswith("not here yet: Qwen/Qwen2.5-VL-3B-Instruct, 7.51 GB, licence: Qwen Research; ")
