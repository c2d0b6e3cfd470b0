"""docs/architectures.md is what the tests' list and the table in code say, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

from docs.make_architectures import PAGE, SHOWN_BY, main, make_page
from tests.tiny_architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_page_is_what_the_lists_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run `python -m docs.make_architectures`"
    assert main(["--check"]) == 0
    assert main(["nonsense"]) == 2


def test_the_page_has_a_row_for_every_architecture_of_the_matrix() -> None:
    table = make_page().partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", table, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [*ARCHITECTURES, "paligemma"]
    assert all(len(cells.split("|")) == 6 for _, cells in rows)


def test_every_test_that_the_page_names_exists() -> None:
    for place in SHOWN_BY.values():
        file, _, function = place.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), place
