"""`stillhouse inspect` on a terminal and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.__main__ import main
from stillhouse.inspection.inspect_cache import inspect_cache
from stillhouse.inspection.sample_text import BAR_WIDTH, draw_bar
from storage.reader.cache import Cache
from tests.stillhouse.hostile_cache import QUESTION, REASON, SAMPLE_ID, write_hostile_cache
from tests.storage.synthetic_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile_cache(tmp_path_factory.mktemp("hostile"))


def test_the_overview_tells_identity_families_counts_errors_and_sharing(cache: Path) -> None:
    text = inspect_cache(cache)
    statistics = Cache.open(cache).statistics()
    lines = {line.split("  ")[0]: line for line in reversed(text.splitlines())}  # the first of a name
    assert "sealed" in lines["cache"]
    assert lines["samples"].endswith("12 (test 2, train 10)")
    assert lines["errors"].endswith("2")
    for family in ("response", "visual"):
        each = statistics["bytes_per_row_by_family"][family]
        assert f"{statistics['num_rows'][family]:,}" in lines[family]
        assert lines[family].endswith(f"{each:,.1f}")
    assert "broken-0: image is truncated" in text
    assert "images named by samples, " in text
    assert "image keys stored: saved about " in text
    for name, value in Cache.open(cache).identity.model_dump(mode="json").items():
        assert lines[name].endswith(str(value))


def test_a_sample_shows_every_token_with_its_teacher(cache: Path) -> None:
    text = inspect_cache(cache, sample_ids=["sample-1-3"])
    rows = Cache.open(cache).read(9).response
    assert rows is not None
    assert "token ids, since the teacher's folder 'tiny' is not here" in text
    assert "   [image 1]\n   [image 2]\n » #20\n   #21 #22 #23 #24 #25\n » #26 #27 #28" in text
    for row, token in enumerate(("#20", "#26", "#27", "#28")):
        (head,) = [line for line in text.splitlines() if line.startswith(f"“{token}”")]
        assert f"entropy {rows.entropy[row]:.3f} nats" in head
        assert f"{rows.num_exact[row]} exact entries" in head
    assert text.count("all that is not exact") == rows.num_rows
    assert text.count("relation ") == 2
    assert "sampled from the tail" in text


def test_several_samples_come_in_the_order_asked_for(cache: Path) -> None:
    text = inspect_cache(cache, sample_ids=["sample-1-3", "sample-0-1"])
    assert 0 < text.index("sample sample-1-3: split train") < text.index("sample sample-0-1: split train")


def test_nothing_of_the_data_set_steers_the_terminal(hostile: Path) -> None:
    text = inspect_cache(hostile) + inspect_cache(hostile, sample_ids=[f"{SAMPLE_ID}0"])
    assert all(character.isprintable() or character == "\n" for character in text)
    assert QUESTION in text
    assert REASON in text
    assert "\\x07" in text


def test_json_holds_the_facts_and_the_samples(hostile: Path) -> None:
    facts = json.loads(inspect_cache(hostile, as_json=True))
    assert facts["num_samples"] == 3
    assert facts["image_sharing"]["num_named"] == 3
    assert facts["image_sharing"]["num_stored"] == 1
    assert list(facts["errors"].values()) == [REASON]
    assert "samples" not in facts
    document = json.loads(inspect_cache(hostile, sample_ids=[f"{SAMPLE_ID}1"], as_json=True))
    (sample,) = document["samples"]
    assert sample["sample_id"] == f"{SAMPLE_ID}1"
    assert sample["images"][0]["num_sharing"] == 3
    assert sample["images"][0]["relation"]["num_rows"] == 9
    answer = sample["segments"][-1]
    assert "".join(token["text"] for token in answer["tokens"]).startswith("<img·src=x")
    rows = Cache.open(hostile).read(1).response
    assert rows is not None
    assert [token["signal"]["entropy"] for token in answer["tokens"]] == rows.entropy.tolist()


def test_the_command_says_what_is_wrong_with_exit_code_2(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        (["--sample", "sample-0-9"], "no sample 'sample-0-9' among 12; nearest: 'sample-0-"),
        (["--sample", "broken-0"], "'broken-0' has no record: image is truncated"),
        (["--sample", "sample-0-1", "--tokenizer", str(tmp_path / "nowhere")], "nowhere is not a folder"),
        (["--html", str(tmp_path / "nowhere" / "page.html")], "cannot be written: No such file"),
    ):
        assert main(["inspect", str(cache), *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["inspect", str(cache), "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_look_at_a_cache_loads_no_heavy_library(verb: str, cache: Path) -> None:
    code = "import sys; from stillhouse.__main__ import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    command = [sys.executable, "-c", code, verb, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "storage.reader.cache" in loaded
    assert loaded & {"torch", "transformers", "ray", "matplotlib", "scipy", "jinja2"} == set()


def test_bars_are_as_long_as_their_fraction() -> None:
    assert draw_bar(0).strip() == ""
    assert draw_bar(1) == "█" * BAR_WIDTH
    assert draw_bar(0.5).rstrip() == "█" * (BAR_WIDTH // 2)
    assert draw_bar(1.5 / BAR_WIDTH).rstrip() == "█▌"
    assert draw_bar(1e-6).rstrip() == "▏"  # little is not nothing
    assert draw_bar(1e-6, mark="░").rstrip() == "░"
    assert {len(draw_bar(fraction / 97)) for fraction in range(98)} == {BAR_WIDTH}
