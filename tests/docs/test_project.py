"""The files that describe the project agree with each other, and its hooks and workflow run what a developer runs."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_citation_licence_and_changelog_are_those_of_the_project() -> None:
    citation = read_yaml("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]
    assert f"## [Unreleased] {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "The Stillhouse authors" in licence
    assert "[yyyy]" not in licence


def test_hooks_are_local_and_use_what_make_installs() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_the_workflow_runs_the_script_of_continuous_integration() -> None:
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["all"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_issue_forms_have_what_github_asks_for() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"]
        assert form["description"]
        for field in form["body"]:
            assert field["type"] in ("textarea", "input")
            assert field["attributes"]["label"]


def test_make_check_builds_the_documentation() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^check: test lint$", makefile, flags=re.MULTILINE)
    assert re.search(r"^lint: .*\bdocs\b", makefile, flags=re.MULTILINE)
    assert "zensical build --clean --strict" in makefile
    wanted = " ".join(PROJECT["optional-dependencies"]["dev"])
    assert "zensical==" in wanted
    assert "mkdocstrings-python" in wanted
