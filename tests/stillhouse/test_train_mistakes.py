"""`train` explains a mistake before torchrun starts, in one sentence that is the last line on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.__main__ import main
from tests.storage.synthetic_cache import write_cache

COMPOSE = {part: f"/nowhere/{part}" for part in ("vision", "llm", "processor")}


def write_experiment(folder: Path, **fields: Any) -> Path:
    stage = {"init": str(folder / "student"), "steps": 2, "num_processes": 2, **fields}
    document = {
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"path": str(folder / "data.jsonl")}]},
        "teacher": {"model": str(folder / "teacher")},
        "cache": {"path": str(folder / "cache")},
        "stages": {"kd": stage},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "has_cache", "words"),
    [
        ({}, False, "no cache is here"),
        ({}, True, "student, which is neither a directory nor a Hub id"),
        ({"steps": 0}, True, "stages.kd.steps"),
        ({"compose": COMPOSE}, False, "no cache is here"),
        ({"compose": COMPOSE}, True, "stages.kd: /nowhere/vision"),
        ({"prune": {"model": "/nowhere/model", "layers": 1}}, True, "stages.kd: /nowhere/model"),
        ({"prune": {"model": "m", "layers": 1}, "compose": COMPOSE}, True, "compose and prune would both make"),
    ],
)
def test_what_a_rank_would_refuse_at_its_start_is_refused_before_torchrun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, Any], has_cache: bool, words: str
) -> None:
    if has_cache:
        write_cache(tmp_path / "cache", families=("response",))
    else:
        (tmp_path / "student").mkdir()  # or it, or its parts, would be missed first
    assert main(["train", str(write_experiment(tmp_path, **fields)), "--stage", "kd"]) == 2
    *before, last = capfd.readouterr().err.splitlines()
    assert words in last
    assert not any("torch" in line or "Traceback" in line for line in before)
    assert not (tmp_path / "runs").exists()
