"""`stillhouse plan --hardware`: bytes and hours from published sizes alone, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.__main__ import main
from stillhouse.config import read_experiment
from stillhouse.published.assumptions import SampleLengths, estimate_relation_bytes, estimate_row_bytes
from stillhouse.published.hardware import parse_hardware
from stillhouse.published.recipe_forecast import forecast_recipe
from storage.config import RelationSection, SelectionSection
from storage.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
STEP = {"epochs": 1, "train": ["projector", "llm"], "gradient_checkpointing": True}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    document: dict[str, Any] = {
        "name": "published",
        "runs_dir": str(tmp_path),
        "data": {
            "sources": [
                {"path": "/nowhere/a.json"},
                {"path": "/nowhere/b.json", "split": "captions", "template": "caption"},
            ],
            "published_rows": {"train": 1000, "captions": 500},
        },
        "teacher": {"model": "Qwen/Qwen2.5-VL-7B-Instruct"},
        "cache": {"families": ["response", "visual"], "visual": {"tau": 0.02}},
        "stages": {
            "kd": {"init": "Qwen/Qwen2.5-VL-3B-Instruct", **STEP},
            "projector": {"init": "{run}/models/kd", **STEP, "train": ["projector"], "splits": ["captions"]},
            "sparse": {"init": "{run}/models/kd", **STEP, "moe": {}},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_forecast_by_hand(file: Path) -> None:
    hardware = parse_hardware("h100x8")
    found = forecast_recipe(read_experiment(file), hardware, lengths=SampleLengths(), price_per_gpu_hour=2.5)
    rate = 8 * 989e12 * 0.3 * 3600  # FLOPs an hour
    (cache,) = found.caches
    text = 1000 * (64 + 150) + 500 * 20
    positions = text + 1500 * 391
    assert (cache.samples, cache.tokens) == (1500, positions)
    assert cache.hours == pytest.approx(2 * 8.29e9 * positions / rate)
    assert cache.family_bytes == pytest.approx(
        {
            "tokens": 1500 * 100 + text * 4,
            "response": (1000 * 150 + 500 * 20) * 46,
            "visual": 1500 * 391 * 31.5,
        }
    )
    kd, projector, sparse = found.stages
    tokens = 1000 * (64 + 150 + 391)
    assert kd.hours == pytest.approx(8 * 3.75e9 * tokens / rate)  # 2 forward, 4 backward, 2 again
    assert kd.checkpoint_bytes == 7.5e9
    assert projector.hours == pytest.approx(6 * 3.75e9 * 500 * (20 + 391) / rate)  # no gradients of its weights
    assert sparse.hours == pytest.approx(kd.hours * 2.2 / 1.8)
    assert sparse.checkpoint_bytes == pytest.approx(7.5e9 * 3.0 / 1.8)
    assert found.gpu_hours == pytest.approx(8 * (cache.hours + kd.hours + projector.hours + sparse.hours))
    assert found.price == pytest.approx(2.5 * found.gpu_hours)


def test_bytes_of_rows_and_matrices_are_the_measured_ones_at_the_measured_settings() -> None:
    for tau, size in ((0.004, 76.0), (0.01, 46.0), (0.02, 31.5), (0.04, 22.6)):
        assert estimate_row_bytes(SelectionSection(tau=tau)) == pytest.approx(size)
    assert 31.5 < estimate_row_bytes(SelectionSection(tau=0.015)) < 46
    assert estimate_row_bytes(SelectionSection(tau=0.05)) < 22.6
    assert estimate_row_bytes(SelectionSection(method="topk", k=128)) == pytest.approx(184.7)
    assert estimate_row_bytes(SelectionSection(method="sampled", draws=50)) == pytest.approx(28.6)
    # docs/storing.md, n = 576
    assert estimate_relation_bytes(RelationSection(), 576) == pytest.approx(332_368, rel=1e-3)
    assert estimate_relation_bytes(RelationSection(encoding="triangle_int8"), 576) == pytest.approx(168_496, rel=0.02)
    assert estimate_relation_bytes(RelationSection(encoding="low_rank"), 576) == pytest.approx(29_008)
    assert estimate_relation_bytes(RelationSection(encoding="pooled", pool=2), 576) == pytest.approx(20_896, rel=0.02)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_forecast_before_anything_is_there(path: Path) -> None:
    found = forecast_recipe(read_experiment(path), parse_hardware("h100x8"))
    assert found.price is None
    assert 0.1 < found.hours < 100
    assert all(stage.hours > 0 for stage in found.stages)
    assert (found.caches[0].hours == 0) == path.stem.startswith("teacher_")


def test_what_is_printed_says_that_it_is_an_estimate(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--hardware", "a100", "--price-per-gpu-hour", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("an estimate from published sizes, on 1 x a100; nothing was measured")
    assert " at 2 a GPU hour" in text
    for words in (
        "312 TFLOP/s",
        "assumed, not measured",
        "docs/storing.md",
        "data.published_rows",
        "960 hours of A100s",
    ):
        assert words in text
    assert main(["plan", str(file), "--hardware", "a100", "--json", "--response-tokens", "300"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["estimate"] is True
    assert document["price"] is None
    assert document["lengths"]["response"] == 300
    assert len(document["assumptions"]) > 5
    assert not list(file.parent.glob("published*"))  # nothing is written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h1000x8"], "expected one of a100, h100, h200, b200, l40s"),
        (["--hardware", "h100x0"], "expected one of a100"),
        (["--hardware", ""], "expected one of a100"),
        (
            ["--price-per-gpu-hour", "2"],
            "--price-per-gpu-hour is for a forecast of published sizes; give --hardware too",
        ),
        (["--response-tokens", "2"], "--response-tokens is for a forecast"),
        (["--hardware", "h100", "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour is -1.0, expected"),
        (["--hardware", "h100", "--price-per-gpu-hour", "nan"], "--price-per-gpu-hour is nan, expected"),
        (["--hardware", "h100", "--caption-tokens", "-1"], "--caption-tokens is -1, expected"),
        (
            ["--hardware", "h100", "teacher.model=/nowhere"],
            "teacher.model is /nowhere, whose published size is not known",
        ),
        (["--hardware", "h100", "data.published_rows={train: 5}"], "the split captions has is not known"),
        (["--hardware", "h100", "stages.kd.init=owner/name"], "stages.kd.init is owner/name, whose published size"),
    ],
)
def test_mistakes(file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_circles_of_stages_and_recipes_end(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    document["teacher"] = {"model": "/nowhere", "recipe": "recipe.yaml"}
    (file.parent / "other.yaml").write_text(yaml.safe_dump(document))
    for overrides in (["stages.kd.init={run}/models/sparse"], ["teacher.model=/nowhere", "teacher.recipe=other.yaml"]):
        with pytest.raises(ConfigError, match="whose published size is not known here"):
            forecast_recipe(read_experiment(file, overrides), parse_hardware("h100"))
