"""`stillhouse report A B`: the page, the table, and folders that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.__main__ import main
from stillhouse.report_page.write_report import write_report
from stillhouse.reporting.experiment_comparison import compare_experiments, default_output, render_comparison
from storage.errors import ConfigError
from tests.stillhouse.reporting.reports import write_experiment

RUNS = {"kd": {"kl": 0.1, "final": {"response": 1.0}}, "sft": {"kl": 0.3, "wrong": ("s1",)}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two experiments with a report, the second without a distilled run."""
    root = tmp_path_factory.mktemp("runs")
    one = write_experiment(root / "one", RUNS, controls={"kd": ["sft"]})
    two = write_experiment(root / "two", {"sft": {}}, controls={})
    for folder in (one, two):
        write_report(folder)
    return [one, two]


def test_experiments_lie_side_by_side(folders: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "deep" / "both.html"
    table = compare_experiments(folders, page)
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.startswith(("one ", "two "))}
    assert rows["one"][1:5] == ["kd", "100.0", "±", "0.0"]
    assert "sft" in rows["one"]
    assert rows["two"][1:3] == ["–", "–"]
    assert "two: There is nothing to compare" in table
    first, second = json.loads(page.with_suffix(".json").read_text())["experiments"]
    assert first["best_run"]["name"] == "kd"
    assert first["best_control"]["exact_match"]["mean"] == 0.5
    assert second["best_run"] is None
    text = page.read_text()
    assert text.index("<strong>one</strong>: That kd beats") < text.index("<h2>Results")
    assert "The caches do not differ in bytes a row" in text


def test_caches_of_different_sizes_are_drawn(folders: list[Path], tmp_path: Path) -> None:
    compare_experiments(folders, tmp_path / "c.html")
    first, _ = json.loads((tmp_path / "c.json").read_text())["experiments"]
    text = render_comparison([{**first, "bytes_per_row": 8.0}, {**first, "label": "<script>", "bytes_per_row": 16.0}])
    assert "bytes a row of the cache" in text
    assert "<script" not in text


def test_folders_that_cannot_be_compared_are_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: report\.json is missing; run `stillhouse report {tmp_path}`"):
        compare_experiments([folders[0], tmp_path], tmp_path / "c.html")
    with pytest.raises(ConfigError, match="one is named twice"):
        compare_experiments([folders[0], folders[1], folders[0] / "models" / ".."], tmp_path / "c.html")
    for output in (tmp_path, tmp_path / "c.json"):
        with pytest.raises(ConfigError, match=r"--output .* is not a page's path"):
            compare_experiments(folders, output)
    assert not list(tmp_path.iterdir())


def test_the_command_compares_several_folders_and_reports_on_one(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = map(str, folders)
    assert main(["report", one, two]) == 0
    assert str(default_output(folders)) in capsys.readouterr().out
    assert default_output(folders).is_file()
    assert main(["report", one]) == 0
    *_, gain, cost = capsys.readouterr().out.splitlines()
    assert gain.startswith("That kd beats sft is not shown: +50.0 points")  # of two questions
    assert cost.startswith("What the cache saved is not known, since")
    assert main(["report", one, "--output", str(tmp_path / "x.html")]) == 2
    assert main(["report", one, str(tmp_path / "none")]) == 2
    assert "report.json is missing" in capsys.readouterr().err


def test_experiments_of_one_name_are_told_apart_by_their_folders(folders: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "one"
    other.mkdir()
    (other / "report.json").write_text((folders[0] / "report.json").read_text())
    compare_experiments([folders[0], other], tmp_path / "c.html")
    labels = [each["label"] for each in json.loads((tmp_path / "c.json").read_text())["experiments"]]
    assert labels == [str(folders[0]), str(other)]
