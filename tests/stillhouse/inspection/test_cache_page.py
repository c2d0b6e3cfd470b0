"""The page of `stillhouse inspect --html`: self-contained, and nothing in a data set can run in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.inspection.inspect_cache import inspect_cache
from tests.stillhouse.hostile_cache import ANSWER, IMAGE_PATH, QUESTION, REASON, SAMPLE_ID, SCRIPT, write_hostile_cache
from tests.storage.synthetic_cache import write_cache

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
OWN_ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "p", "b", "i", "div", "span",
    "table", "tr", "th", "td", "a", "code", "section", "figure", "img", "figcaption", "br", "small", "details",
    "summary", "dl", "dt", "dd",
}  # fmt: skip


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile_cache(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def page(hostile: Path) -> Path:
    inspect_cache(hostile, html=hostile.parent / "page.html")
    return hostile.parent / "page.html"


def test_texts_of_the_data_set_add_no_element_and_no_attribute(page: Path) -> None:
    elements = Elements(page.read_text())
    assert {tag for tag, _ in elements.found} <= OWN_ELEMENTS
    names = {name for _, attributes in elements.found for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "id", "style", "title", "href", "src",
                     "alt"}  # fmt: skip
    for text in (SAMPLE_ID, QUESTION, IMAGE_PATH, REASON):
        assert text in elements.text
    marked = ANSWER.replace(" ", "·").replace("\x07", "\\x07")
    assert marked in elements.text


def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    elements = Elements(page.read_text())
    links = [value or "" for _, found in elements.found for name, value in found.items() if name in ("href", "src")]
    assert all(link.startswith(("#s", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"url\(|@import|@font-face", page.read_text().split("</style>")[0])
    policies = [found["content"] for _, found in elements.found if found.get("http-equiv")]
    assert policies == [POLICY]


def test_every_sample_of_the_contents_is_on_the_page(page: Path) -> None:
    elements = Elements(page.read_text())
    wanted = [str(found["href"])[1:] for tag, found in elements.found if tag == "a"]
    sections = [found["id"] for tag, found in elements.found if tag == "section"]
    assert wanted == sections == ["s1", "s2", "s3"]
    assert len([found for tag, found in elements.found if tag == "img" and found.get("alt") == "image 1"]) == 3


def test_samples_that_are_asked_for_are_the_only_ones(hostile: Path, tmp_path: Path) -> None:
    inspect_cache(hostile, sample_ids=[f"{SAMPLE_ID}2", f"{SAMPLE_ID}0"], html=tmp_path / "page.html")
    elements = Elements((tmp_path / "page.html").read_text())
    assert len([1 for tag, _ in elements.found if tag == "section"]) == 2
    assert f"{SAMPLE_ID}1" not in elements.text
    assert elements.text.index(f"{SAMPLE_ID}2") < elements.text.index(f"{SAMPLE_ID}0")


def test_an_image_that_is_not_there_is_said_to_be_missing(hostile: Path, tmp_path: Path) -> None:
    inspect_cache(hostile, images=tmp_path, html=tmp_path / "page.html")
    text = Elements((tmp_path / "page.html").read_text()).text
    assert text.count(f"image not shown: not found below {tmp_path}") == 3


@pytest.mark.parametrize("families", [(), ("response",), ("relation",), ("response", "visual", "relation")])
def test_a_cache_of_any_families_has_a_page(tmp_path: Path, families: tuple[str, ...]) -> None:
    write_cache(tmp_path / "cache", families=families)
    inspect_cache(tmp_path / "cache", html=tmp_path / "page.html")
    elements = Elements((tmp_path / "page.html").read_text())
    assert ("Where the teacher was least sure" in elements.text) == ("response" in families)
    assert "At random" in elements.text
    assert ("The cache holds no response rows." in elements.text) == ("response" not in families)
    assert ("relation matrix" in elements.text) == ("relation" in families)


def test_the_same_cache_gives_the_same_page(hostile: Path, page: Path, tmp_path: Path) -> None:
    inspect_cache(hostile, html=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()


@needs_chromium
def test_a_script_in_a_caption_does_not_run_in_a_browser(page: Path, tmp_path: Path) -> None:
    """The page's policy is taken off first, so that the escaping alone must hold."""
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()))
    dom = browse("--dump-dom", bare, tmp_path)
    assert title_of(dom) == f"{page.parent.name}/cache · Stillhouse"
    assert {tag for tag, _ in Elements(dom).found} <= OWN_ELEMENTS | {"tbody"}

    bare.write_text(bare.read_text().replace("<header>", f"{SCRIPT}<header>"))
    assert title_of(browse("--dump-dom", bare, tmp_path)) == "owned"  # or the test above could not fail

    bare.write_text(page.read_text().replace("<header>", f"{SCRIPT}<header>"))
    assert title_of(browse("--dump-dom", bare, tmp_path)) != "owned"  # the policy holds where an escape failed


@needs_chromium
def test_a_browser_draws_the_page(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(f"--screenshot={shot}", page, tmp_path)
    with Image.open(shot) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    assert tuple(colours[counts.argmax()]) in {(251, 250, 247), (255, 255, 255)}  # the style sheet's paper, a card
    assert len(colours) > 100
    assert (pixels == (200, 85, 61)).all(-1).any()  # the accent of a label


def browse(what: str, page: Path, folder: Path) -> str:
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1800", what,
               f"--user-data-dir={folder / 'profile'}", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout


def title_of(dom: str) -> str:
    found = re.search("<title>(.*?)</title>", dom)
    assert found
    return found[1]
