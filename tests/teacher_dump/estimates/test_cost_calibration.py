"""A forecast against the dump that follows it, with a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.__main__ import main
from stillhouse.reporting.plan_table import format_forecast
from storage.backends.folder import open_folder
from storage.layout.commits import list_committed_parts, read_commits
from storage.layout.segments import read_segments
from teacher_dump.estimates.cost_calibration import choose_halves, forecast_dump
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.teacher_dump.conftest import WriteConfig
from tests.tiny import make_tiny_dataset

FAMILIES = ("tokens", "response", "visual", "relation")


def family_bytes(cache: Path) -> dict[str, int]:
    """Returns the bytes of the files that a cache's commits name, by family."""
    folder = open_folder(cache)
    (segment,) = read_segments(folder)
    commits = read_commits(folder, segment, list_committed_parts(folder, segment))
    return {family: sum(commit.families[family].file_bytes for commit, _ in commits) for family in FAMILIES}


@pytest.mark.ci
@pytest.mark.slow
def test_a_forecast_of_bytes_is_within_a_tenth_of_the_dump(write_config: WriteConfig, tmp_path: Path, capsys) -> None:
    data = make_tiny_dataset(tmp_path / "data", num_samples=360, num_images=90, turns=2)["train"]
    config = write_config(data={"sources": [{"path": str(data)}]}, dump={"samples_per_part": 60})
    assert main(["plan", str(config), "--samples", "120", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # nothing else is printed there
    assert not (tmp_path / "cache").exists()
    settings = read_settings(config)
    planned = plan_dump(settings)
    worker = Worker(make_worker_settings(planned, settings))
    outcomes = [worker.run(part) for part in planned.plan.parts]
    actual = family_bytes(tmp_path / "cache")
    assert found["parts"] == len(outcomes) == 6
    assert found["samples"] == sum(outcome.num_samples for outcome in outcomes) == 360
    assert found["rows"]["visual"] == 90 * 16
    assert found["tokens"] == pytest.approx(sum(outcome.num_tokens for outcome in outcomes), rel=0.05)
    assert found["total_bytes"] == pytest.approx(sum(actual.values()), rel=0.1)
    for family, size in actual.items():
        assert found["family_bytes"][family] == pytest.approx(size, rel=0.15), family
    assert found["scoring_s"] > 0
    assert main(["plan", str(config), "--samples", "8"]) == 0
    assert any(line.startswith("bytes in all") for line in capsys.readouterr().out.splitlines())


def test_tokens_are_forecast_without_a_teacher(write_config: WriteConfig) -> None:
    config = write_config(cache={"families": []})
    found = forecast_dump(read_settings(config))
    assert found.calibration_samples == 24
    assert set(found.family_bytes) == {"tokens"}
    assert set(found.stage_s) == {"prompts", "encoding", "scoring"}
    assert found.data is not None
    assert (found.data.num_samples, found.data.num_images) == (24, 8)
    assert format_forecast(found).splitlines()[-1].startswith("data: 24 samples, 8 images: no image is ")


def test_a_slice_has_whole_groups_of_images_and_is_always_the_same(write_config: WriteConfig) -> None:
    parts = plan_dump(read_settings(write_config())).plan.parts
    halves = choose_halves(parts, 9)
    assert halves == choose_halves(parts, 9)
    one, other = ({image for sample in half.samples for image in sample.images} for half in halves)
    assert not one & other
    assert [len(half.samples) for half in halves] == [6, 3]  # 24 samples over 8 images, three to an image
    assert sum(len(half.samples) for half in choose_halves(parts, 1000)) == 24


def test_samples_that_are_all_broken_are_named(write_config: WriteConfig, tmp_path: Path, capsys) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"id": "odd", "image": "gone.png", "conversations": []}\n')
    assert main(["plan", str(write_config(data={"sources": [{"path": str(data)}]}))]) == 2
    assert "none of the 1 samples can be used: odd: " in capsys.readouterr().err


def test_too_few_samples_are_a_users_mistake(write_config: WriteConfig, capsys) -> None:
    assert main(["plan", str(write_config()), "--samples", "1"]) == 2
    assert "expected at least 2" in capsys.readouterr().err
