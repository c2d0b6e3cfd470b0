"""report.html: its order, nothing from elsewhere, nothing of the data can run in it, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stillhouse.inspection.token_texts import load_token_texts
from stillhouse.report_page.gallery import build_gallery, list_questions, locate_sample, strip_roles
from stillhouse.report_page.page import SECTIONS
from stillhouse.report_page.write_report import write_report
from stillhouse.reporting.reproduction import record_command
from stillhouse.reporting.results import read_results
from stillhouse.reporting.run_settings import find_differences
from storage.reader.cache import Cache
from tests.stillhouse.hostile_cache import CATEGORY, QUESTION, SAMPLE_ID, SCRIPT, write_hostile_cache
from tests.stillhouse.reporting.reports import write_experiment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
RUNS = {
    f"kd{SCRIPT}": {
        "kl": 0.1,
        "final": {"response": 1.0},
        "wrong": (f"{SAMPLE_ID}0",),
        "relations": [
            {"sample_id": f"{SAMPLE_ID}0", "image": "i", "cosine": 0.5, "num_tokens": 9, "matrix": np.eye(9).tolist()}
        ],
    },
    "sft": {"kl": 0.3, "wrong": (f"{SAMPLE_ID}0", f"{SAMPLE_ID}1")},
}
CONTROLS = {f"kd{SCRIPT}": ["sft"]}
SAMPLES = [(f"{SAMPLE_ID}{number}", CATEGORY) for number in range(3)]


class Page(HTMLParser):
    """Elements with their attributes, ids, text, and the elements that were not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def list_values(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.found if name in attributes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment judged on a cache whose every text tries to run a script, with its report."""
    root = tmp_path_factory.mktemp("hostile")
    cache = write_hostile_cache(root)
    file = root / "pipeline.yaml"
    file.write_text(f"name: x # {SCRIPT}\n")
    command = record_command(file, ["stages.a.steps=3", f"name={SCRIPT}"])
    write_experiment(root, RUNS, controls=CONTROLS, cache=cache, samples=SAMPLES, command=command)
    write_report(root)
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_verdict_comes_first_and_every_section_is_in_the_contents(folder: Path, page: Page) -> None:
    assert not page.open  # every element is closed
    report = json.loads((folder / "report.json").read_text())
    title, gain, cost = (page.text.index(text) for text in (report["name"], report["verdict"], report["cost_sentence"]))
    assert title < gain < cost < page.text.index("What was run")
    names = [name for name in SECTIONS if name != "routers"]  # no student is sparse
    assert [found["href"] for tag, found in page.found if tag == "a"] == [f"#{name}" for name in names]
    assert [found["id"] for tag, found in page.found if tag == "section"] == names
    assert len(page.list_values("id")) == len(set(page.list_values("id")))  # those of the plots too
    parts = re.split(r"<section ", (folder / "report.html").read_text())[1:]
    assert all("<h2>" in part and len(part) > 300 for part in parts)


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    links = [link for name in ("href", "src", "xlink:href") for link in page.list_values(name)]
    assert all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    ids = set(page.list_values("id"))
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    styles = " ".join(page.list_values("style") + page.list_values("clip-path"))
    assert set(re.findall(r"url\(#([^)]+)\)", styles)) <= ids
    assert not re.search(r"url\((?!#)|@import|@font-face", styles + page.text)
    assert [found["content"] for tag, found in page.found if found.get("http-equiv")] == [POLICY]
    assert "script" not in {tag for tag, _ in page.found}


def test_texts_of_the_data_add_no_element_and_no_attribute(page: Page) -> None:
    assert not {name for _, attributes in page.found for name in attributes if name.startswith("on")}
    assert {tag for tag, _ in page.found}.isdisjoint({"script", "b", "object", "iframe", "form", "input"})
    for text in (QUESTION.strip(), f"kd{SCRIPT}", f"{SAMPLE_ID}1", "no <b>", SCRIPT):
        assert text in page.text


def test_the_gallery_shows_picture_question_answers_and_the_teacher_s_choices(folder: Path, page: Page) -> None:
    results = read_results(folder)
    gallery = build_gallery(results, f"kd{SCRIPT}")
    (item,) = gallery.items  # of the one picture
    assert item.sample_id == f"{SAMPLE_ID}1"  # its KL is the largest
    assert item.value == pytest.approx(4 * 0.1 * 1.5)
    (turn,) = item.turns
    assert turn.question == QUESTION.strip()
    assert [(each.text, each.correct, each.num_seeds) for each in turn.answers["sft"]] == [("no <b>", False, 2)]
    assert turn.teacher is None  # so its rows are open
    assert item.tokens
    assert item.pictures[0].uri.startswith("data:image/png;base64,")
    opened = [found for tag, found in page.found if tag == "details" and "open" in found]
    assert len(opened) == 1
    assert "gave no answer of its own" in page.text


def test_matrices_of_teacher_and_student_lie_side_by_side(page: Page) -> None:
    names = [found["alt"] for tag, found in page.found if tag == "img" and "heat" in str(found.get("class"))]
    assert names[0] == "teacher"
    assert str(names[1]).endswith("0.500")
    assert "no matrix: judged on other images" in page.text  # of sft


def test_how_to_repeat_it_names_command_versions_and_fingerprints(folder: Path, page: Page) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["reproduction"]["command"].startswith(
        f"stillhouse run {folder}/pipeline.yaml stages.a.steps=3 'name="
    )
    assert report["reproduction"]["versions"] == {"torch": "9.9"}
    for text in (report["reproduction"]["command"], "9.9", f"name: x # {SCRIPT}"):
        assert text in page.text
    for value in (*report["cache"]["fingerprints"].values(), report["reproduction"]["file_sha256"]):
        assert value in page.text


def test_evaluations_of_an_earlier_version_make_a_page_that_says_what_it_lacks(tmp_path: Path) -> None:
    cache = write_hostile_cache(tmp_path)
    write_experiment(tmp_path, RUNS, controls=CONTROLS, cache=cache, samples=SAMPLES, earlier=True)
    text = Page(write_report(tmp_path).read_text()).text
    for said in (
        "keep no KL of single samples. Shown are questions that all its seeds answered wrongly",
        "keep no relation matrices",
        "KL and cross-entropy by question type are not in these evaluations",
        "The command was not recorded",
        "Versions of packages were not recorded for",
    ):
        assert said in " ".join(text.split())


def test_what_is_not_on_this_machine_is_said_instead(tmp_path: Path) -> None:
    cache = write_hostile_cache(tmp_path)
    write_experiment(tmp_path, RUNS, controls=CONTROLS, cache=cache, samples=SAMPLES)
    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(tmp_path / "teacher")  # its tokenizer
    text = Page(write_report(tmp_path).read_text()).text
    assert "picture not shown: " in text
    assert "Questions and tokens are shown as token ids, since the teacher's folder" in text
    shutil.rmtree(cache)
    text = Page(write_report(tmp_path).read_text()).text
    assert "The cache cannot be read here: " in text
    assert "The teacher's relation matrices cannot be read here: " in text
    assert "What the cache saved is not known, since the cache cannot be read here: " in text


def test_an_experiment_without_anything_to_compare_has_a_page(tmp_path: Path) -> None:
    write_experiment(tmp_path, {"sft": {}}, controls={})
    text = Page(write_report(tmp_path).read_text()).text
    assert "There is nothing to compare" in text
    assert "No distilled run was compared with a control" in text


def test_the_page_stays_small_however_much_was_logged(tmp_path: Path) -> None:
    samples = [(f"s{number}", f"type {number % 40}") for number in range(2000)]
    write_experiment(tmp_path, {f"run{number}": {} for number in range(6)}, controls={}, samples=samples)
    for log in tmp_path.glob("models/*/*/metrics.jsonl"):
        log.write_text("".join(f'{{"step": {step}, "cross_entropy": 2.0}}\n' for step in range(5000)))
    page = write_report(tmp_path)
    assert page.stat().st_size < 600_000
    assert "There are 40 question types, too many for a plot." in page.read_text()


def test_samples_of_several_caches_are_found_by_their_number() -> None:
    entry = {"caches": ["/a", "/b"]}
    assert locate_sample("1:x:y", entry, None) == ("/b", "x:y")
    assert locate_sample("7:x", entry, None) == ("/a", "7:x")
    assert locate_sample("1:x", {"caches": ["/a"]}, None) == ("/a", "1:x")
    assert locate_sample("x", {}, "/shared") == ("/shared", "x")


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("user\nWhat is it?\nassistant\n", "What is it?"),
        ("USER: \nWhat is it? ASSISTANT:", "What is it?"),
        ("system\nuser\nA model of what?", "A model of what?"),
        ("Is it a user", "Is it a"),
        ("assistant\n", "assistant"),
    ],
)
def test_marks_of_roles_are_no_part_of_a_question(text: str, bare: str) -> None:
    assert strip_roles(text) == bare


def test_questions_of_a_conversation_are_told_apart(folder: Path) -> None:
    cache = Cache.open(folder / "cache")
    tokens = cache.read(0).tokens
    questions = list(list_questions(tokens, load_token_texts(cache.identity, None), cache.identity.image_token_id))
    assert questions == [QUESTION.strip()]


def test_only_settings_that_differ_are_named() -> None:
    def trained(steps: int, losses: dict, splits: list[str], cache: str) -> list[dict]:
        stage = {"steps": steps, "lr": 0.1, "losses": losses, "seed": steps}
        inputs = {"stage": stage, "caches": [{"splits": splits, "num_samples": 4}]}
        return [{"inputs": inputs, "train_caches": [cache]}]

    response = {"weight": 2.0, "divergence": "forward_kl"}
    runs = {
        "sft": trained(3, {"response": None}, ["train"], "own_answers"),
        "kd": trained(6, {"response": response}, ["train", "more"], "cache"),
        "lost": [{"inputs": {}}],
    }
    assert find_differences(runs) == {
        "sft": {"caches": "own_answers", "data.splits": "train", "losses.response.weight": "–", "steps": "3"},
        "kd": {"caches": "cache", "data.splits": "train, more", "losses.response.weight": "2.0", "steps": "6"},
    }


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [390, 820])
def test_nothing_is_wider_than_a_phone(folder: Path, tmp_path: Path, width: int) -> None:
    """In a frame of the page's own width, since a window may not be narrow. The frame's script is the test's."""
    text = (folder / "report.html").read_text()
    probe = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join(' of ')</script>"
    bare = re.sub(r"<meta http-equiv[^>]*>", "", text)
    (tmp_path / "page.html").write_text(bare.replace("</body>", f"{probe}</body>"))
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="900" style="border:0"></iframe>'
        "<script>f.onload = () => document.title = f.contentDocument.title</script>"
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[2]) == width
    assert int(found[1]) <= width
