"""The check of a built site finds what leads nowhere and what is loaded from another host."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.check_site import find_problems, main


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "picture.svg").write_text("<svg/>")
    (tmp_path / "assets" / "site.css").write_text("a { background: url(picture.svg) }")
    (tmp_path / "guide.html").write_text('<h1 id="start">Start</h1>')
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="assets/site.css"><img src="assets/picture.svg"><a href="guide.html#start">a</a>'
        '<a href="https://example.org/">elsewhere</a><a href="#here">b</a><p id="here"></p>'
        '<a href="/guide.html">c</a><a href="mailto:x@example.org">d</a><img src="data:image/png;base64,AA==">'
    )
    return tmp_path


def test_a_whole_site_has_no_problem(site: Path) -> None:
    assert list(find_problems(site)) == []
    assert main([str(site)]) == 0


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<img src="assets/gone.svg">', "assets/gone.svg leads to no file"),
        ('<a href="gone.html">x</a>', "gone.html leads to no file"),
        ('<a href="../outside.html">x</a>', "../outside.html leads to no file"),
        ('<a href="guide.html#gone">x</a>', "guide.html#gone: there is no such heading"),
        ('<a href="#gone">x</a>', "#gone: there is no such heading"),
        ('<script src="https://example.org/x.js"></script>', "<script> loads https://example.org/x.js"),
        ('<link rel="preconnect" href="//fonts.example.org">', "<link> loads //fonts.example.org"),
        ('<img srcset="assets/picture.svg 1x, https://example.org/p.png 2x">', "<img> loads https://example.org/p.png"),
    ],
)
def test_what_leads_nowhere_or_elsewhere_is_found(site: Path, html: str, problem: str) -> None:
    (site / "page.html").write_text(html)
    (found,) = find_problems(site)
    assert found.startswith("page.html: ")
    assert problem in found
    assert main([str(site)]) == 1


@pytest.mark.parametrize(
    "style", ['@import "https://example.org/a.css";', "a { background: url('//example.org/b.png') }"]
)
def test_a_style_sheet_loads_nothing_from_another_host(site: Path, style: str) -> None:
    (site / "assets" / "site.css").write_text(style)
    (found,) = find_problems(site)
    assert found.startswith("assets/site.css: loads ")


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    assert main([str(tmp_path / "gone")]) == 2
    assert main([]) == 2
