from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stillhouse.config import read_experiment
from storage.errors import ConfigError
from storage.home_paths import expand_path


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/mnt/disk")
    monkeypatch.delenv("GONE", raising=False)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/data", "/home/me/data"),
        ("~", "/home/me"),
        ("$DISK/a", "/mnt/disk/a"),
        ("${DISK}2/a", "/mnt/disk2/a"),
        ("s3://bucket/~a", "s3://bucket/~a"),
        ("a~b/$", "a~b/$"),
        ("{run}/cache", "{run}/cache"),
        ("owner/name", "owner/name"),
    ],
)
def test_home_and_variables_are_expanded(path: str, expanded: str) -> None:
    assert expand_path(path) == expanded
    assert expand_path(expanded) == expanded


def test_every_path_of_a_file_is_expanded_and_nothing_else(tmp_path: Path) -> None:
    document = {
        "runs_dir": "$DISK/runs",
        "prepare": {"script": "~/make.py", "arguments": {"note": "$DISK"}},
        "data": {
            "sources": [{"path": "~/d/*.parquet", "images": "$DISK/images", "columns": {"id": "$DISK"}}],
            "extracted": "${DISK}/x",
        },
        "teacher": {"model": "~/teacher"},
        "cache": {"path": "$DISK/cache"},
        "stages": {
            "one": {
                "init": "~/student",
                "output": "$DISK/out",
                "caches": [{"path": "~/c", "images": "~/i"}],
                "compose": {"vision": "~/v", "llm": "~/l", "processor": "$DISK/p"},
                "steps": 1,
                "losses": {"response": {}},
            }
        },
        "evaluation": {"images": "~/i"},
    }
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(document))
    found = read_experiment(file)
    assert found.run == Path("/mnt/disk/runs/digits")
    assert found.prepare is not None
    assert (found.prepare.script, found.prepare.arguments) == ("/home/me/make.py", {"note": "$DISK"})
    (source,) = found.data.sources
    assert (source.path, source.images, source.columns) == ("/home/me/d/*.parquet", "/mnt/disk/images", {"id": "$DISK"})
    assert (found.data.extracted, found.teacher.model, found.cache.path) == (
        "/mnt/disk/x",
        "/home/me/teacher",
        "/mnt/disk/cache",
    )
    stage = found.stages["one"]
    assert stage.caches is not None
    assert stage.compose is not None
    assert [stage.init, stage.output, stage.caches[0].path, stage.caches[0].images] == [
        "/home/me/student", "/mnt/disk/out", "/home/me/c", "/home/me/i",
    ]  # fmt: skip
    assert [stage.compose.vision, stage.compose.llm, stage.compose.processor] == [
        "/home/me/v",
        "/home/me/l",
        "/mnt/disk/p",
    ]
    assert found.evaluation.images == "/home/me/i"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cache.path=$GONE/cache", r"cache\.path: .*variable GONE is not set"),
        ("runs_dir=$GONE", "runs_dir: the environment variable GONE is not set"),
        ("teacher.model=~nobody-is-called-so/x", "~nobody-is-called-so is no user of this machine"),
    ],
)
def test_an_unknown_variable_or_user_in_a_path_is_refused(tmp_path: Path, override: str, said: str) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"teacher": {"model": "x"}}))
    with pytest.raises(ConfigError, match=said):
        read_experiment(file, (override,))
