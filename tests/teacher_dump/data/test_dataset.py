from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storage.errors import ConfigError
from storage.records.sample_key import HALVES, SampleKey
from teacher_dump.config import DataSection, SourceSection
from teacher_dump.data.dataset import SampleSet, read_samples
from teacher_dump.data.sample import Sample, Turn

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]


def write_image(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / name)


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(*paths: Path, **fields: Any) -> SampleSet:
    extracted = paths[0].parent / "extracted"
    return read_samples([SourceSection(path=str(path), **fields) for path in paths], extracted=extracted)


def test_reads_one_image_many_images_and_none(tmp_path: Path) -> None:
    write_image(tmp_path, "a.png")
    write_image(tmp_path, "deep/b.png")
    rows = [
        {"id": "one", "image": "a.png", "conversations": TURNS, "category": "colour"},
        {"id": 2, "image": ["a.png", "deep/b.png"], "conversations": TURNS},
        {"id": "none", "conversations": TURNS},
    ]
    got = read(write_rows(tmp_path / "rows.jsonl", rows), split="test")
    assert got.errors == ()
    assert [(sample.id, sample.images, sample.category) for sample in got.samples] == [
        ("one", ("a.png",), "colour"),
        ("2", ("a.png", "deep/b.png"), ""),
        ("none", (), ""),
    ]
    assert {sample.split for sample in got.samples} == {"test"}
    assert [turn.role for turn in got.samples[0].turns] == ["user", "assistant"]


def test_json_array_reads_as_json_lines_do(tmp_path: Path) -> None:
    rows = [{"id": str(number), "conversations": TURNS} for number in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    from_lines = read(write_rows(tmp_path / "rows.jsonl", rows)).samples
    assert list(read(tmp_path / "rows.json").samples) == list(from_lines)


def test_every_bad_row_is_named_and_counted(tmp_path: Path) -> None:
    write_image(tmp_path, "a.png")
    (tmp_path / "folder").mkdir()
    bad = {
        "gone": {"id": "gone", "image": "gone.png", "conversations": TURNS},
        "folder": {"id": "folder", "image": "folder", "conversations": TURNS},
        "number": {"id": "number", "image": 7, "conversations": TURNS},
        "silent": {"id": "silent", "conversations": []},
        "robot": {"id": "robot", "conversations": [{"from": "robot", "value": "hi"}]},
        "question": {"id": "question", "conversations": TURNS[:1]},
        "answer": {"id": "answer", "conversations": TURNS[::-1]},
        "late": {"id": "late", "conversations": [*TURNS, {"from": "system", "value": "x"}]},
        "wordless": {"id": "wordless", "conversations": [TURNS[0], {"from": "gpt", "value": None}]},
        "surrogate": {"id": "surrogate", "conversations": [TURNS[0], {"from": "gpt", "value": "\ud800"}]},
    }
    nameless = ["{broken", [1, 2], {"conversations": TURNS}, {"id": "good", "conversations": TURNS}]
    rows = [{"id": "good", "image": "a.png", "conversations": TURNS}, *bad.values(), *nameless]
    got = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert [sample.id for sample in got.samples] == ["good"]
    assert len(got.errors) == len(rows) - 1
    assert {error.sample_id for error in got.errors} >= set(bad)
    reasons = {error.sample_id: error.reason for error in got.errors}
    assert "gone.png" in reasons["gone"]
    assert "is missing" in reasons["gone"]
    duplicate = got.errors[-1]
    assert "duplicate id 'good'" in duplicate.reason
    assert "rows.jsonl:1" in duplicate.reason
    assert len({error.sample_id for error in got.errors} | {"good"}) == len(rows)


def test_duplicate_ids_are_found_across_sources_and_positions_avoid_them(tmp_path: Path) -> None:
    rows = [{"id": "same", "conversations": TURNS}]
    one, two = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", rows)
    got = read(one, two)
    assert (len(got.samples), len(got.errors)) == (1, 1)
    numbered = read(one, two, ids="position")
    assert [sample.id for sample in numbered.samples] == ["one:0", "two:0"]


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/hostname", "inside/../../secret.png", "link/../../secret.png", "a\0b"]
)
def test_an_image_outside_of_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    write_image(tmp_path, "secret.png")
    root = tmp_path / "images"
    (root / "inside").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": "x", "image": path, "conversations": TURNS}])
    got = read(rows, images=str(root))
    assert not got.samples
    assert len(got.errors) == 1


def test_image_paths_are_relative_to_the_common_folder_of_all_sources(tmp_path: Path) -> None:
    write_image(tmp_path / "one", "a.png")
    write_image(tmp_path / "two", "a.png")
    for name in ("one", "two"):
        write_rows(tmp_path / name / "rows.jsonl", [{"id": name, "image": "a.png", "conversations": TURNS}])
    got = read(tmp_path / "one/rows.jsonl", tmp_path / "two/rows.jsonl")
    assert got.image_root == tmp_path
    assert [sample.images for sample in got.samples] == [("one/a.png",), ("two/a.png",)]


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    rows = [{"id": str(number), "conversations": TURNS} for number in range(5)]
    assert [sample.id for sample in read(write_rows(tmp_path / "r.jsonl", rows), limit=2).samples] == [
        "0",
        "1",
    ]


def test_sources_that_cannot_be_read_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        read_samples([], extracted=tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        read(tmp_path / "gone.jsonl")
    (tmp_path / "broken.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read(tmp_path / "broken.json")


def test_a_sample_round_trips_through_json(tmp_path: Path) -> None:
    rows = [{"id": "x", "category": "c", "conversations": TURNS}]
    (sample,) = read(write_rows(tmp_path / "r.jsonl", rows)).samples
    assert Sample.from_json(json.loads(json.dumps(sample.as_json()))) == sample
    assert sample.as_json()["turns"] == [["user", "what?"], ["assistant", "red"]]  # as plans before had it
    turns = (*sample.turns, Turn("user", "sure?"), Turn("assistant", "no", is_trained=False))
    masked = replace(sample, turns=turns)
    assert Sample.from_json(json.loads(json.dumps(masked.as_json()))) == masked


def test_weight_takes_a_stable_share_of_the_rows_or_repeats_them(tmp_path: Path) -> None:
    rows = [{"id": str(number), "conversations": TURNS} for number in range(2000)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    quarter = [sample.id for sample in read(path, weight=0.25).samples]
    assert abs(len(quarter) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert quarter == [sample.id for sample in read(path, weight=0.25).samples]
    assert quarter != [sample.id for sample in read(path, weight=0.25, seed=1).samples]
    assert set(quarter) < {sample.id for sample in read(path, weight=0.5).samples}
    assert quarter[:10] == [sample.id for sample in read(path, weight=0.25, limit=10).samples]
    write_rows(path, [*rows, {"id": "more", "conversations": TURNS}])
    assert quarter == [sample.id for sample in read(path, weight=0.25).samples if sample.id != "more"]
    got = read(write_rows(tmp_path / "few.jsonl", rows[:40]), weight=2.5)
    assert got.errors == ()
    assert [sample.id for sample in got.samples][:2] == ["0", "0~2"]
    thirds = [sample.id for sample in got.samples if sample.id.endswith("~3")]
    assert 8 < len(thirds) < 32
    assert len(got.samples) == 80 + len(thirds)


def test_a_broken_row_that_is_taken_twice_is_two_errors_with_two_ids(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", ["{broken", {"id": "x", "conversations": []}])
    got = read(path, path, weight=2)
    ids = [error.sample_id for error in got.errors]
    assert len(ids) == len(set(ids)) == 8
    assert not got.samples


def test_a_weight_that_selects_no_row_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"id": str(number), "conversations": TURNS} for number in range(3)])
    with pytest.raises(ConfigError, match=r"r\.jsonl: weight 1e-09 selects none of its 3 rows; give a larger weight"):
        read(path, weight=1e-9)
    empty = read(write_rows(tmp_path / "empty.jsonl", []), weight=1e-9)
    assert not empty.samples
    assert not empty.errors


def test_an_error_names_its_place_once(tmp_path: Path) -> None:
    first, second = (f"{tmp_path.name}/r.jsonl:{number}" for number in (1, 2))
    rows = ["{broken", {"id": "x", "conversations": []}, {"id": first, "conversations": TURNS}]
    found = read(write_rows(tmp_path / "r.jsonl", rows)).errors
    assert [error.sample_id for error in found] == [f"row {first}", "x"]
    broken, empty = map(str, found)
    assert broken.startswith(f"{first}: is not valid JSON")
    assert empty.startswith(f"x: {second}: ")


def test_a_pair_is_two_samples_and_a_broken_one_two_errors(tmp_path: Path) -> None:
    write_image(tmp_path, "a.png")
    good = {"image": "a.png", "question": "what?", "chosen": "red", "rejected": "blue"}
    rows = [{"id": 1, **good}, {"id": 2, **good, "image": "gone.png"}, {"id": 3, **good, "rejected": None}, good]
    got = read(write_rows(tmp_path / "r.jsonl", [*rows, rows[0]]))
    assert [sample.id for sample in got.samples] == ["1#chosen", "1#rejected"]
    assert [sample.turns[-1].text for sample in got.samples] == ["red", "blue"]
    assert [sample.images for sample in got.samples] == [("a.png",)] * 2
    ids = [error.sample_id.rpartition("/")[2] for error in got.errors]
    assert ids == ["2#chosen", "2#rejected", "3#chosen", "3#rejected", "r.jsonl:4", "r.jsonl:5"]
    numbered = read(write_rows(tmp_path / "n.jsonl", [good, good]), ids="position", weight=2)
    assert len({sample.id for sample in numbered.samples}) == len(numbered.samples) == 8


def test_keys_are_made_of_rows_and_never_of_their_ids(tmp_path: Path) -> None:
    pair = {"id": "b", "question": "what?", "chosen": "red", "rejected": "blue"}
    own = [{"id": name, "conversations": TURNS} for name in ("a#chosen", "a~2", "x~2#rejected")]
    one, other = write_rows(tmp_path / "one.jsonl", own), write_rows(tmp_path / "two.jsonl", [pair])
    got = read_samples(
        [SourceSection(path=str(one)), SourceSection(path=str(other), weight=2)], extracted=tmp_path / "extracted"
    )
    assert got.errors == ()
    assert [sample.key for sample in got.samples] == [
        SampleKey("a#chosen"),
        SampleKey("a~2"),
        SampleKey("x~2#rejected"),
        *(SampleKey("b", half, copy, 1) for copy in (0, 1) for half in HALVES),
    ]
    assert [sample.id for sample in got.samples][3:] == ["b#chosen", "b#rejected", "b~2#chosen", "b~2#rejected"]


def test_two_rows_with_one_text_are_a_duplicate(tmp_path: Path) -> None:
    """The second copy of `a` has the text of a row's own id, and so has one half of `b`, which is left out whole."""
    rows = [{"id": name, "conversations": TURNS} for name in ("a~2", "a", "b#rejected")]
    pair = {"id": "b", "question": "what?", "chosen": "red", "rejected": "blue"}
    found = read(write_rows(tmp_path / "r.jsonl", [*rows, pair]), weight=2)
    kept = ["a~2", "a~2~2", "a", "b#rejected", "b#rejected~2", "b~2#chosen", "b~2#rejected"]
    assert [sample.id for sample in found.samples] == kept
    copy, half = found.errors
    assert "duplicate id 'a~2', first seen at" in copy.reason
    assert "duplicate id 'b#rejected', first seen at" in half.reason


def test_a_failed_row_with_the_id_of_its_place_keeps_it(tmp_path: Path) -> None:
    place = f"{tmp_path.name}/r.jsonl:1"
    (error,) = read(write_rows(tmp_path / "r.jsonl", [{"id": place, "conversations": []}])).errors
    assert error.sample_id == place
    assert error.key == SampleKey(place)


def test_folders_that_no_image_is_in_do_not_matter(tmp_path: Path) -> None:
    write_image(tmp_path / "one", "a.png")
    text = write_rows(tmp_path / "text.jsonl", [{"id": "t", "conversations": TURNS}])
    rows = write_rows(tmp_path / "one/rows.jsonl", [{"id": "i", "image": "a.png", "conversations": TURNS}])
    got = read(text, rows)
    assert got.image_root == tmp_path / "one"
    assert [sample.images for sample in got.samples] == [(), ("a.png",)]


def test_links_inside_of_the_folder_are_followed_to_one_file(tmp_path: Path) -> None:
    write_image(tmp_path, "deep/a.png")
    (tmp_path / "link.png").symlink_to("deep/a.png")
    (tmp_path / "other").symlink_to("deep")
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = ["deep/a.png", "link.png", "other/a.png", "./deep/../deep/a.png", str(tmp_path / "deep/a.png"), "loop.png"]
    rows = [{"id": str(number), "image": name, "conversations": TURNS} for number, name in enumerate(names)]
    got = read(write_rows(tmp_path / "r.jsonl", rows))
    assert [sample.images for sample in got.samples] == [("deep/a.png",)] * 5
    assert [error.sample_id for error in got.errors] == ["5"]


def test_a_list_of_sources_is_a_section_too() -> None:
    sources = [{"path": "a.json", "weight": 0.5}, {"path": "b.parquet"}]
    assert DataSection.model_validate(sources) == DataSection.model_validate({"sources": sources})
    with pytest.raises(ValueError, match="subset belongs to format"):
        SourceSection(path="a.json", format="json", subset="x")


def test_links_that_lead_out_of_a_local_folder_are_followed_under_their_own_names(tmp_path: Path) -> None:
    write_image(tmp_path / "disk", "deep/a.png")
    root = tmp_path / "playground"
    root.mkdir()
    (root / "data").symlink_to(tmp_path / "disk")
    (root / "b.png").symlink_to(tmp_path / "disk/deep/a.png")
    (root / "gone.png").symlink_to(tmp_path / "disk/gone.png")
    names = ["data/deep/a.png", "b.png", "gone.png", "data/../b.png", str(tmp_path / "disk/deep/a.png")]
    rows = [{"id": str(number), "image": name, "conversations": TURNS} for number, name in enumerate(names)]
    got = read(write_rows(tmp_path / "r.jsonl", rows), images=str(root))
    assert [sample.images for sample in got.samples] == [("data/deep/a.png",), ("b.png",)]
    assert (got.image_root / got.samples[0].images[0]).is_file()
    assert [error.sample_id for error in got.errors] == ["2", "3", "4"]


def test_addresses_that_hold_or_name_a_local_image_are_read(tmp_path: Path) -> None:
    write_image(tmp_path, "deep/a b.png")
    content = (tmp_path / "deep/a b.png").read_bytes()
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"

    def asked(item: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [item, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "red"},
        ]

    rows = [
        {"id": "0", "messages": asked({"type": "image_url", "image_url": {"url": data}})},
        {"id": "1", "messages": asked({"type": "image_url", "image_url": data})},
        {"id": "2", "messages": asked({"type": "image", "image": data.replace("image/png", "image")})},
        {"id": "3", "messages": asked({"type": "image", "image": f"file://{tmp_path}/deep/a%20b.png"})},
        {"id": "4", "image": data, "conversations": TURNS},
        {"id": "4b", "image": f"file://localhost{tmp_path}/deep/a b.png", "conversations": TURNS},
        {"id": "4c", "image": "file://deep/a b.png", "conversations": TURNS},
        {"id": "5", "messages": asked({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})},
        {"id": "6", "messages": asked({"type": "image", "image": "file:///etc/hostname"})},
        {"id": "7", "image": data[:-3] + "!!!", "conversations": TURNS},
        {"id": "8", "image": base64.b64encode(content * 999).decode(), "conversations": TURNS},
    ]
    got = read(write_rows(tmp_path / "r.jsonl", rows))
    assert [sample.id for sample in got.samples] == ["0", "1", "2", "3", "4", "4b", "4c"]
    shown = [(got.image_root / sample.images[0]).read_bytes() for sample in got.samples]
    assert shown == [content] * 7
    assert "is an address" in got.errors[0].reason
    assert "outside" in got.errors[1].reason
    assert "base64 is broken" in got.errors[2].reason
    assert len(got.errors[3].reason) < 200


@pytest.mark.parametrize("field", ["id", "category", "image", "conversations", "messages", "question", "role", "value"])
def test_a_reason_shows_no_more_than_sixty_characters_of_a_value(tmp_path: Path, field: str) -> None:
    long = ["z" * 500_000]
    row: dict[str, Any] = {"id": "x", "conversations": TURNS, field: long}
    if field == "question":
        row = {"id": "x", "question": long, "answer": "a"}
    if field in ("role", "value"):
        row = {"id": "x", "messages": [{"role": "user", "content": "q", field: long}]}
    for one in (row, {key: value[0] if value is long else value for key, value in row.items()}):
        for error in read(write_rows(tmp_path / "r.jsonl", [one])).errors:
            assert "z" * 61 not in error.reason
            assert "z" * 61 not in error.sample_id


def test_columns_leave_out_the_name_they_map_from(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "what?", "text": "red", "answer": "not this"}]
    path = write_rows(tmp_path / "r.jsonl", rows)
    got = read(path, columns={"question": "prompt", "answer": "text"})
    assert [[turn.text for turn in sample.turns] for sample in got.samples] == [["what?", "red"]]
    swapped = read(path, columns={"question": "answer", "answer": "prompt"}).samples
    assert [turn.text for turn in swapped[0].turns] == ["not this", "what?"]
    with pytest.raises(ConfigError, match=r"columns names sytem, which no row has; the first row has id, prompt, text"):
        read(path, columns={"question": "prompt", "answer": "text", "system": "sytem"})


def test_positions_are_those_of_a_source_where_files_share_a_name(tmp_path: Path) -> None:
    rows = [{"id": "same", "conversations": TURNS}] * 2
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    paths = [write_rows(tmp_path / name / "train.jsonl", rows) for name in ("one", "two", "three")]
    got = read(*paths, ids="position")
    assert [sample.id for sample in got.samples] == [
        "train:0", "train:1", "train@2:0", "train@2:1", "train@3:0", "train@3:1",
    ]  # fmt: skip
    assert got.errors == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            json.dumps({"data": [{"id": str(n), "conversations": TURNS} for n in range(500)]}, indent=1),
            "'data' (a list)",
        ),
        (json.dumps({"x1": {"id": "x1", "conversations": TURNS}}, indent=2), "'x1' (an object)"),
        ("id,question\n1,what?\n2,who?\n", "begins with 'id,question"),
        ("<html>\n<body>\n" + "<p>\n" * 300, "begins with '<html>"),
    ],
)
def test_json_that_is_neither_list_nor_lines_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read(tmp_path / "rows.json")
    assert said in str(raised.value)
    assert len(str(raised.value)) < 400


def test_lines_of_which_the_first_is_broken_are_lines_still(tmp_path: Path) -> None:
    rows = [{"id": str(number), "conversations": TURNS} for number in range(3)]
    got = read(write_rows(tmp_path / "r.json", ["{broken", *rows]))
    assert [len(got.samples), len(got.errors)] == [3, 1]
