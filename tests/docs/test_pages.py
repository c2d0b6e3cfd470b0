"""README is short, every page is in the site's menu, and links between the repository's own texts lead to files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "storage").glob("*.md"), *ROOT.glob("examples/*/*.md")]
)
LINK = re.compile(r"(?<!`)\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_readme_is_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) < 400  # no line that hides a page


def _pages(entries: list) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            found += _pages(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_menu_once() -> None:
    menu = _pages(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    assert sorted(menu) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:storage|teacher_dump|student_train|stillhouse|tests|docs|benchmarks)/[\w./-]*)`", text)
    )
    assert len(named) > 60
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_architecture_has_twenty_lines_of_where_to_change_what() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| to change | open |")[2].partition("\n\n")[0]
    assert table.count("\n| ") >= 20
