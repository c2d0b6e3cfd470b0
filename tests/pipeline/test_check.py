"""`stillhouse check` looks at the students that will be trained on a cache before anything costs money."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.check import check
from pipeline.config import read_experiment
from storage.errors import ConfigError, IdentityError
from storage.writer import CacheWriter
from teacher_dump.dump import plan_dump, read_settings
from tests.tiny import make_tiny_dataset, make_tiny_llava


@pytest.fixture
def file(tmp_path: Path) -> Path:
    data = make_tiny_dataset(tmp_path, num_samples=4, num_images=2)
    for name in ("teacher", "student"):
        make_tiny_llava(tmp_path / name)
    stage = {"steps": 1, "losses": {"response": {}, "visual": {}}}
    document = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(data["train"]), "images": str(tmp_path), "split": "train"}]},
        "teacher": {"model": str(tmp_path / "teacher"), "dtype": "float32", "max_length": 128},
        "stages": {
            "kd": {"init": str(tmp_path / "student"), **stage},
            "later": {"init": "{run}/models/kd", **stage},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_student_that_does_not_fit_the_cache_is_found(file: Path) -> None:
    experiment = read_experiment(file)
    assert not any("stages" in line for line in check(experiment))  # there is no cache yet
    settings = read_settings(file)
    CacheWriter.open(experiment.cache.path, plan_dump(settings).identity, ("response", "visual"))
    student = Path(experiment.stages["kd"].init)
    lines = list(check(experiment))
    assert lines[-1] == f"stages.kd: {student} fits the cache"  # the stage `later` starts from what is not there yet
    config = json.loads((student / "config.json").read_text())
    config["text_config"]["vocab_size"] = 299
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(IdentityError, match=r"vocab_size: the cache has 300, the head of .*student 299 rows"):
        list(check(experiment))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.kd.splits=[trian]", r"stages\.kd\.splits names trian; data\.sources has train"),
        ("ablations.runs={kd: {stage: kd}}", r"evaluation\.splits names test; data\.sources has train"),
        ("stages.kd.init=/nowhere", r"stages\.kd\.init is /nowhere: there is no such folder"),
        ("stages.later.init=nowhere", r"stages\.later\.init is nowhere: there is no such folder"),
    ],
)
def test_what_will_never_be_there_is_found(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(check(read_experiment(file, [override])))


def test_a_checkpoint_that_a_stage_writes_or_the_hub_may_have_is_no_mistake(file: Path) -> None:
    for override in ("stages.later.init={run}/models/kd", "stages.kd.init=owner/name"):
        list(check(read_experiment(file, [override])))
