"""Mistakes that must fail are refused before any work; estimates give warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.__main__ import main
from stillhouse.config import read_experiment
from stillhouse.preflight import (
    DiskNeed,
    check_disk_space,
    check_preconditions,
    check_stage_inputs,
    estimate_disk_needs,
    write_forecast,
)
from storage.errors import ConfigError
from student_train.models.prune import prune
from student_train.training.layer_change import LayerChange
from tests.small_disk import SmallDisk, small_disk
from tests.tiny import make_tiny_llava


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("student") / "llava", num_layers=1)


@pytest.fixture
def file(tmp_path: Path, student: Path) -> Path:
    stage = {"init": str(student), "steps": 1, "precision": "fp32"}
    document = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(tmp_path / "train.json"), "split": "train"}]},
        "teacher": {"model": str(student)},
        "stages": {"kd": stage},
        "evaluation": {"splits": ["train"]},
        "ablations": {
            "seeds": [0, 1],
            "runs": {"kd": {"stage": "kd"}, "half": {"stage": "kd", "after": "kd", "set": {"precision": "bf16"}}},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "runs", 8 << 20) as found:
        yield found


def test_checkpoint_sizes_are_estimated_from_their_inits(file: Path, student: Path) -> None:
    weights = (student / "model.safetensors").stat().st_size
    found = estimate_disk_needs(read_experiment(file, ["stages.kd.save_every=1"]))
    sizes = {need.description: need.num_bytes for need in found if need.kind == "least"}
    assert list(sizes) == [f"the checkpoint of {name}-seed{seed}" for seed in (0, 1) for name in ("kd", "half")]
    assert all(0.9 * weights < sizes[f"the checkpoint of kd-seed{seed}"] < weights for seed in (0, 1))
    assert sizes["the checkpoint of half-seed0"] * 2 == sizes["the checkpoint of kd-seed0"]
    states = [need.description for need in found if need.kind == "temporary"]
    assert states == [f"states of {name}-seed{seed}" for seed in (0, 1) for name in ("kd", "half")]
    run = read_experiment(file).run / "models" / "kd" / "seed0"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(b"")  # one that is there is replaced, not added
    assert "the checkpoint of kd-seed0" not in {need.description for need in estimate_disk_needs(read_experiment(file))}


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [0, 2]},
        {"layers": 2, "width": {"intermediate_size": 40}},
        {"layers": 1, "width": {"hidden_size": 32, "intermediate_size": 100}},
    ],
)
def test_the_size_of_a_pruned_checkpoint_is_estimated_from_its_model(
    tmp_path: Path, file: Path, fields: dict[str, Any]
) -> None:
    model = make_tiny_llava(tmp_path / "model", num_layers=3)
    document = yaml.safe_load(file.read_text())
    document["stages"]["kd"] |= {"init": "{run}/pruned", "prune": {"model": str(model), **fields}}
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    needs = {need.path.name: need for need in estimate_disk_needs(read_experiment(file))}
    section = read_experiment(file).stages["kd"].prune
    assert section is not None
    pruned = prune(section, measure=LayerChange(read_experiment(file).stages["kd"], section, ""))
    real = sum(parameter.numel() for parameter in pruned.parameters())
    assert 0.7 * real < needs["pruned"].num_bytes / 2 <= real
    assert needs["seed0"].description == "the checkpoint of half-seed0"
    assert sum("the pruned" in need.description for need in estimate_disk_needs(read_experiment(file))) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prune": {"model": "/nowhere/model", "layers": 1}}, "stages.kd.prune.model is /nowhere/model, which"),
        (
            {"compose": {"vision": "/nowhere/tower", "llm": "a/b", "processor": "a/b"}},
            "stages.kd.compose.vision is /nowhere/tower, which",
        ),
    ],
)
def test_parts_that_nothing_makes_are_refused(file: Path, fields: dict[str, Any], message: str) -> None:
    document = yaml.safe_load(file.read_text())
    document["stages"]["kd"] |= {"init": "{run}/made", **fields}
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        list(check_preconditions(read_experiment(file)))


@pytest.mark.parametrize("verb", ["check", "run", "ablate"])
def test_a_disk_that_is_certainly_too_small_is_refused(
    file: Path, disk: SmallDisk, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "train.json").write_text("[]")  # `check` names missing inputs first
    disk.fill(free_bytes=1_500_000)
    assert main([verb, str(file)]) == 2
    said = capsys.readouterr().err
    assert " MB free, and at least 2.1 MB will be written there (the checkpoint of kd-seed0 " in said
    assert said.endswith("free space there, or give another runs_dir\n")
    assert said.count("\n") == 1


def test_an_estimate_is_warned_of_and_never_refused(tmp_path: Path) -> None:
    (line,) = check_disk_space([DiskNeed(tmp_path / "cache", 10**18, "the cache", "about")], tmp_path)
    assert line.startswith("warning: the disk of ")
    assert "about 1000000.0 TB or more will be written (the cache 1000000.0 TB)" in line
    (line,) = check_disk_space([], tmp_path)
    assert line.endswith("how much will be written is not known yet")
    with pytest.raises(ConfigError, match=r"at least 1000000\.0 TB will be written there"):
        list(check_disk_space([DiskNeed(tmp_path, 10**18, "a checkpoint", "least")], tmp_path))


def test_the_forecast_of_plan_is_compared(file: Path) -> None:
    experiment = read_experiment(file)
    experiment.run.mkdir(parents=True)
    write_forecast(experiment.run, num_samples=1000, num_bytes=10**17)
    line = next(line for line in check_preconditions(experiment) if "the disk of" in line)
    assert line.startswith("warning: ")
    assert "the cache of 1,000 samples, by the forecast of `stillhouse plan` 100000.0 TB" in line
    (experiment.run / "forecast.json").write_text(json.dumps({"samples": "many"}))
    assert any(line.startswith("disk: ") for line in check_preconditions(experiment))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs_dir=/proc/runs", r"runs_dir/name is /proc/runs/tiny: it cannot be written"),
        ("cache.path=/proc/cache", r"cache\.path is /proc/cache: it cannot be written"),
        ("data.extracted=/proc/images", r"data\.extracted is /proc/images: it cannot be written"),
        ("stages.kd.output=/proc/kd", r"stages\.kd\.output is /proc/kd: it cannot be written"),
        ("ablations.gpus_per_run=1000", r"ablations\.gpus_per_run asks for 1000 GPUs and this machine has"),
        ("dump.gpus_per_actor=1000", r"dump\.gpus_per_actor asks for 1000 GPUs and this machine has"),
        ("evaluation.splits=[trian]", r"evaluation\.splits names trian; data\.sources has train"),
        ("stages.kd.init=/nowhere", r"stages\.kd\.init is /nowhere, which is neither a directory"),
    ],
)
def test_mistakes_that_must_fail_are_refused_before_work(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(check_preconditions(read_experiment(file, [override])))


def test_gpus_of_a_cluster_are_not_counted_here(file: Path) -> None:
    overrides = ["ablations.gpus_per_run=1000", "dump.gpus_per_actor=1000", "dump.ray_address=cluster:6379"]
    lines = list(check_preconditions(read_experiment(file, overrides)))
    assert any("Ray's cluster at cluster:6379 may have or start as many as a run needs" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.kd.init=/nowhere", r"stages\.kd\.init is /nowhere, which is neither a directory"),
        ("stages.kd.output=/proc/kd", r"stages\.kd\.output is /proc/kd: it cannot be written"),
    ],
)
def test_train_refuses_before_it_starts_processes(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stage_inputs(read_experiment(file, [override]), "kd")
    check_stage_inputs(read_experiment(file, ["stages.other={init: /nowhere, steps: 1}"]), "kd")  # others do not matter
