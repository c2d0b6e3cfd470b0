"""A dump of token ids composes the model whose tokenizer and template it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.__main__ import main
from stillhouse.check import check_experiment
from stillhouse.composed_teacher import compose_teacher, find_composed_teacher
from stillhouse.config import read_experiment
from storage.reader.cache import Cache
from tests.recipe_stand_ins import make_hub_model
from tests.tiny import make_tiny_dataset


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = make_tiny_dataset(tmp_path, num_samples=4, num_images=2)
    source = {"path": str(data["train"]), "images": str(tmp_path)}
    vision, llm = (str(make_hub_model(name, tmp_path)) for name in ("google/siglip", "Qwen/base"))
    document: dict[str, Any] = {
        "name": "teacher",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"sources": [source]},
        "teacher": {"model": "{run}/models/composed"},
        "cache": {"families": []},
        "more_caches": {
            "captions": {"set": {"data.sources": [{**source, "template": "caption"}]}},
        },
        "stages": {
            "init": {
                "init": "{run}/models/composed",
                "compose": {"vision": vision, "llm": llm, "template": "llava_kd"},
                "steps": 1,
            }
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_dump_composes_first_and_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = read_experiment(file)
    lines = list(check_experiment(experiment))
    assert "stages.init: the parts of compose fit together" in lines
    assert lines[-1].startswith("not checked yet: samples, prompts and cache; `dump` first composes ")
    assert find_composed_teacher(experiment) == "init"
    assert main(["dump", str(file)]) == 0
    assert "composing " in capsys.readouterr().out
    assert find_composed_teacher(experiment) is None
    weights = experiment.run / "models" / "composed" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    compose_teacher(experiment)
    assert main(["dump", str(file), "--cache", "captions"]) == 0
    assert weights.stat().st_mtime_ns == before
    chat, captions = (Cache.open(path, families=()) for path in (experiment.cache.path, *experiment.more_caches))
    assert chat.num_samples == captions.num_samples == 4
    list(check_experiment(experiment))  # now the samples are checked, too


def test_mistakes_are_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", str(file), "--cache", "caption"]) == 2
    assert "--cache is 'caption'; more_caches of " in capsys.readouterr().err
    broken = yaml.safe_load(file.read_text())["stages"]["init"]["compose"] | {"llm": str(file.parent / "none")}
    assert main(["dump", str(file), f"stages.init.compose={json.dumps(broken)}"]) in (1, 2)
    assert "none" in capsys.readouterr().err
    assert not (read_experiment(file).run / "models").exists()
