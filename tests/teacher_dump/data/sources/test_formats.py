"""One data set in every format that a source may have, and the inputs that each format must refuse."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage.errors import ConfigError
from teacher_dump.config import SourceSection
from teacher_dump.data.dataset import SampleSet, read_samples
from teacher_dump.data.sources.formats import detect_format
from tests.hypothesis_profiles import examples

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


IMAGES = {"a.png": picture(1), "deep/b.png": picture(2)}
ROWS: list[dict[str, Any]] = [
    {"id": "one", "images": ["a.png"], "conversations": TURNS, "category": "colour"},
    {"id": "two", "images": ["a.png", "deep/b.png"], "conversations": TURNS, "category": "colour"},
    {"id": "none", "images": [], "conversations": TURNS, "category": None},
]


def read(path: Path | str, tmp_path: Path, **fields: Any) -> SampleSet:
    return read_samples([SourceSection(path=str(path), **fields)], extracted=tmp_path / "extracted")


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": [{"bytes": IMAGES[name], "path": name} for name in row["images"]]}


def write_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def write_folder(folder: Path) -> Path:
    for name, content in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, rows: list[dict[str, Any]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for row in rows:
            add(tar, f"./{row['id']}.json", json.dumps({**row, "images": None}).encode())
            for number, name in enumerate(row["images"]):
                add(tar, f"./{row['id']}.{number}.png", IMAGES[name])
    return path


def make_source(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Writes the data set in one format; returns its path, and further fields of its source."""
    folder.mkdir(exist_ok=True)
    if kind == "jsonl with a folder":
        write_folder(folder)
        return write_jsonl(folder), {}
    if kind == "jsonl with a zip":
        with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in IMAGES.items():
                archive.writestr(name, content)
        return write_jsonl(folder), {"images": str(folder / "images.zip")}
    if kind == "jsonl with a tar":
        with tarfile.open(folder / "images.tar.gz", "w:gz") as tar:
            for name, content in IMAGES.items():
                add(tar, f"./{name}", content)
        return write_jsonl(folder), {"images": str(folder / "images.tar.gz")}
    if kind == "parquet with bytes":
        pq.write_table(pa.Table.from_pylist([with_bytes(row) for row in ROWS]), folder / "rows.parquet")
        return folder / "rows.parquet", {}
    if kind == "parquet parts with paths":
        write_folder(folder)
        pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "part-0.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS[1:]), folder / "part-1.parquet")
        return folder / "part-*.parquet", {}
    if kind == "saved data set":
        import datasets

        datasets.disable_progress_bars()
        features = datasets.Features(
            {
                "id": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
                "category": datasets.Value("string"),
            }
        )
        made = datasets.Dataset.from_list([with_bytes(row) for row in ROWS], features=features)
        datasets.DatasetDict({"train": made.select([0]), "other": made}).save_to_disk(folder / "saved")
        return folder / "saved", {"hub_split": "other"}
    return write_tar(folder / "rows.tar", ROWS), {}


KINDS = (
    "jsonl with a folder",
    "jsonl with a zip",
    "jsonl with a tar",
    "parquet with bytes",
    "parquet parts with paths",
    "saved data set",
    "webdataset",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_samples_and_images(kind: str, tmp_path: Path) -> None:
    path, fields = make_source(kind, tmp_path / "data")
    got = read(path, tmp_path, **fields)
    assert got.errors == ()
    assert [(sample.id, sample.category) for sample in got.samples] == [
        ("one", "colour"),
        ("two", "colour"),
        ("none", ""),
    ]
    assert [[turn.text for turn in sample.turns] for sample in got.samples] == [["what?", "red"]] * 3
    names = [list(sample.images) for sample in got.samples]
    shown = [[(got.image_root / image).read_bytes() for image in images] for images in names]
    assert shown == [[IMAGES[name] for name in row["images"]] for row in ROWS]
    assert names[0][0] == names[1][0]  # equal images are one file
    again = read(path, tmp_path, **fields)
    assert (list(again.samples), again.errors, again.image_root) == (list(got.samples), got.errors, got.image_root)


def test_the_format_follows_the_suffix_and_unknown_ones_are_refused_by_name(tmp_path: Path) -> None:
    expected = {
        "a.json": "json",
        "a.JSONL": "json",
        "a.parquet": "parquet",
        "a.tar": "webdataset",
        "a.tar.gz": "webdataset",
    }
    assert {name: detect_format(SourceSection(path=name)) for name in expected} == expected
    assert detect_format(SourceSection(path="some/where", format="datasets")) == "datasets"
    with pytest.raises(ConfigError, match=r"rows\.csv.*json, parquet, webdataset or datasets"):
        read("rows.csv", tmp_path)
    with pytest.raises(ConfigError, match="save_to_disk did not write"):
        read(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"part-\*\.parquet: no file"):
        read(tmp_path / "part-*.parquet", tmp_path)
    path, _ = make_source("saved data set", tmp_path / "data")
    with pytest.raises(ConfigError, match="has no split 'gone', only train, other"):
        read(path, tmp_path, hub_split="gone")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.tar"])
def test_a_file_that_is_not_what_it_is_called_is_a_users_mistake(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not at all")
    with pytest.raises(ConfigError, match=name):
        read(tmp_path / name, tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="neither a folder nor a zip or tar"):
        read(tmp_path / "rows.jsonl", tmp_path, images=str(tmp_path / name))


def test_columns_name_a_sources_own_fields(tmp_path: Path) -> None:
    rows = [{"idx": 7, "picture": {"bytes": IMAGES["a.png"], "path": None}, "q": "what?", "a": "red"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "vqa.parquet")
    columns = {"id": "idx", "image": "picture", "question": "q", "answer": "a"}
    (sample,) = read(tmp_path / "vqa.parquet", tmp_path, columns=columns).samples
    assert (sample.id, [turn.text for turn in sample.turns], len(sample.images)) == ("7", ["what?", "red"], 1)


def test_rows_of_parquet_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [{"id": f"{n}", "question": "q" * 50, "answer": f"{n * 7919}" * 9} for n in range(400)]
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 200 : start + 500] = b"\xff" * 300
    path.write_bytes(bytes(content))
    got = read(path, tmp_path)
    assert 128 <= len(got.samples) <= 200
    (error,) = got.errors
    assert f"{400 - len(got.samples)} of 400 rows cannot be read" in error.reason


def test_invalid_utf8_in_parquet_costs_its_row(tmp_path: Path) -> None:
    answers = pa.array([b"red", b"\xff\xfe", b"blue"], pa.binary()).cast(pa.string(), safe=False)
    fields = {"id": pa.array(["0", "1", "2"]), "question": pa.array(["q"] * 3), "answer": answers}
    pq.write_table(pa.table(fields), tmp_path / "rows.parquet")
    got = read(tmp_path / "rows.parquet", tmp_path)
    assert [sample.id for sample in got.samples] == ["0", "2"]
    assert len(got.errors) == 1


def test_hostile_members_of_a_tar_cost_their_row_and_write_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as tar:
        for key in ("good", "../../escape", "/etc/absolute", "link", "device", "huge", "naked", "broken", "\udcff"):
            if key != "naked":
                row = b"{" if key == "broken" else json.dumps({"conversations": TURNS}).encode()
                add(tar, f"{key}.json", row)
            info = tarfile.TarInfo(f"{key}.png")
            if key in ("link", "device"):
                info.type = tarfile.SYMTYPE if key == "link" else tarfile.CHRTYPE
                info.linkname = "/etc/hostname"
                tar.addfile(info)
            else:
                add(tar, f"{key}.png", bytes(300 * 2**20) if key == "huge" else IMAGES["a.png"])
    got = read(path, tmp_path)
    assert [sample.id for sample in got.samples] == ["good", "../../escape", "/etc/absolute", "?"]
    reasons = "\n".join(error.reason for error in got.errors)
    for said in (
        "link.png is not a plain file",
        "device.png is not a plain file",
        "314,572,800 bytes",
        "no .json member",
        "not valid JSON",
    ):
        assert said in reasons
    files = {found.relative_to(tmp_path).parts[0] for found in tmp_path.rglob("*") if found.is_file()}
    assert files == {"rows.tar", "extracted"}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_lost_end_of_a_cut_tar_is_reported(mode: str, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [{**ROWS[0], "id": f"{number:02d}"} for number in range(20)], mode)
    content = whole.read_bytes()
    end = len(content.rstrip(b"\0")) if mode == "w" else len(content) - 1
    for size in range(len(content) // 3, end, 1111):
        (tmp_path / "cut.tar").write_bytes(content[:size])
        got = read(tmp_path / "cut.tar", tmp_path)
        assert len(got.samples) < 20 or mode == "w:gz"
        assert len(got.errors) >= 1
        assert [sample.id for sample in got.samples] == [f"{number:02d}" for number in range(len(got.samples))]


def test_a_damaged_header_in_the_middle_of_a_tar_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "rows.tar", [{**ROWS[0], "id": f"{number:02d}"} for number in range(4)])
    content = bytearray(path.read_bytes())
    at = content.index(b"./02.json")
    content[at : at + 9] = b"\x00garbage!"
    path.write_bytes(bytes(content))
    got = read(path, tmp_path)
    assert [sample.id for sample in got.samples] == ["00"]
    assert [error.sample_id.rpartition("/")[2] for error in got.errors] == ["01", "(end)"]
    assert "damaged" in got.errors[-1].reason


def test_hostile_members_of_a_zip_cost_their_samples(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../up.png", IMAGES["a.png"])
        archive.writestr("bomb.png", bytes(300 * 2**20))
        archive.writestr("empty.png", b"")
        archive.writestr("bad.png", IMAGES["a.png"] * 20)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    at = content.index(b"bad.png") + len(b"bad.png") + 4
    content[at : at + 8] = b"\xff" * 8
    (tmp_path / "images.zip").write_bytes(bytes(content))
    names = ("../../up.png", "bomb.png", "empty.png", "bad.png", "gone.png", "a\0b")
    rows = [{"id": name.replace("\0", "0"), "image": name, "conversations": TURNS} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    got = read(tmp_path / "rows.json", tmp_path, images=str(tmp_path / "images.zip"))
    assert [sample.id for sample in got.samples] == ["../../up.png"]
    assert len(got.errors) == 5
    assert got.image_root == tmp_path / "extracted"
    assert len([found for found in (tmp_path / "extracted").rglob("*") if found.is_file()]) == 1


def test_json_bombs_and_endless_lines_cost_their_row(tmp_path: Path) -> None:
    good = json.dumps({"id": "good", "conversations": TURNS}).encode()
    path = tmp_path / "rows.jsonl"
    numbers = b'{"id": ' + b"9" * 5000 + b"}"
    lines = [b"[" * 100_000, b'{"id": "' + b"x" * (65 * 2**20) + b'"}', b"\xff\xfe{}", b'{"id": "\xff"}', numbers, good]
    path.write_bytes(b'{"a": 1}\n' + b"\n".join(lines) + b"\n")
    got = read(path, tmp_path)
    assert [sample.id for sample in got.samples] == ["good"]
    assert len(got.errors) == 6
    assert any("longer than" in error.reason for error in got.errors)
    assert max(len(error.reason) for error in got.errors) < 1000


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=examples(60))
@given(st.lists(values, max_size=6), st.sampled_from([None, 1, 4]), st.booleans())
def test_json_arrays_are_parsed_as_the_standard_library_does(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii_only: bool
) -> None:
    from teacher_dump.data.sources.json_rows import read_json_rows

    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    try:
        expected = json.loads(path.read_bytes())
    except UnicodeDecodeError:
        with pytest.raises(ConfigError, match="UTF-8"):
            list(read_json_rows(path))
        return
    assert [row for _, row in read_json_rows(path)] == expected


def test_json_arrays_longer_than_a_chunk_are_read_whole(tmp_path: Path) -> None:
    rows = [{"id": f"{number}", "conversations": TURNS, "pad": "ü" * (number % 7) * 40_000} for number in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 8 * 2**20
    assert [sample.id for sample in read(path, tmp_path).samples] == [row["id"] for row in rows]
    for damage in ("]", "", ",", "] 1"):
        path.write_text(json.dumps(rows)[:-1] + ("]" + damage if damage != "" else ""), encoding="utf-8")
        with pytest.raises(ConfigError, match="not valid JSON"):
            read(path, tmp_path)


rows_of_anything = st.fixed_dictionaries(
    {},
    optional={
        name: values | st.just(TURNS) | st.lists(st.just({"role": "user", "content": [{"type": "image"}]}), max_size=2)
        for name in ("id", "image", "images", "conversations", "messages", "texts", "question", "answer", "prompt",
                     "chosen", "rejected", "category")
    },
)  # fmt: skip


@settings(max_examples=examples(150))
@given(st.lists(rows_of_anything | values, max_size=6))
def test_every_row_becomes_samples_or_named_errors(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    got = read(folder / "rows.jsonl", folder)
    ids = [sample.id for sample in got.samples] + [error.sample_id for error in got.errors]
    assert len(set(ids)) == len(ids)
    assert len(rows) <= len(ids) <= 2 * len(rows)
    for error in got.errors:
        assert os.fsencode(error.reason).decode()
        assert error.reason.count("rows.jsonl:") >= 1


def write_members(path: Path, members: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def shades(got: SampleSet) -> list[list[int]]:
    opened = [[Image.open(got.image_root / name) for name in sample.images] for sample in got.samples]
    return [[image.getpixel((0, 0))[0] for image in images] for images in opened]  # type: ignore[index]


SORTED = ("0", "1", "10", "11", "2")  # as an upload sorts names


@pytest.mark.parametrize("named", ["in full", "beside", "by suffix", "in items"])
def test_the_members_that_a_tars_json_names_are_its_images_in_that_order(named: str, tmp_path: Path) -> None:
    order = ["2", "0", "11", "10"]
    names = {"in full": "set/a.{}.png", "beside": "a.{}.png", "by suffix": "{}.png", "in items": "a.{}.png"}[named]
    row: dict[str, Any] = {"images": [names.format(number) for number in order], "conversations": TURNS}
    if named == "in items":
        items: list[dict[str, Any]] = [{"type": "image", "image": name} for name in row["images"]]
        content = [*items, {"type": "text", "text": "what?"}]
        row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    pictures = {f"set/a.{number}.png": picture(int(number)) for number in SORTED}
    got = read(write_members(tmp_path / "rows.tar", {"set/a.json": row, **pictures}), tmp_path)
    assert got.errors == ()
    assert shades(got) == [[2, 0, 11, 10]]


def test_a_tars_own_order_is_kept_and_said_once_where_numbers_say_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members: dict[str, Any] = {}
    for key in ("a", "b"):
        members[f"{key}.json"] = {"conversations": TURNS}
        members |= {f"{key}.{number}.png": picture(int(number)) for number in SORTED}
    got = read(write_members(tmp_path / "rows.tar", members), tmp_path)
    assert shades(got) == [[0, 1, 10, 11, 2]] * 2
    (record,) = caplog.records
    assert "a.0.png, a.1.png, a.10.png, a.11.png, a.2.png" in record.getMessage()
    caplog.clear()
    read(write_members(tmp_path / "rows.tar", dict(list(members.items())[:4])), tmp_path)
    assert not caplog.records


def test_names_that_a_tars_members_do_not_have_are_refused_or_taken_for_origins(tmp_path: Path) -> None:
    members = {
        "a.json": {"images": ["0.png", "7.png"], "conversations": TURNS},
        "a.0.png": picture(0),
        "a.1.png": picture(1),
        "b.json": {"images": ["coco/x.jpg", "coco/y.jpg", "coco/z.jpg"], "conversations": TURNS},
        "b.0.png": picture(0),
        "c.json": {"image": "coco/x.jpg", "conversations": TURNS},
        "c.png": picture(3),
    }
    got = read(write_members(tmp_path / "rows.tar", members), tmp_path)
    assert [sample.id for sample in got.samples] == ["c"]
    assert shades(got) == [[3]]
    assert "image '7.png' is none of its members" in got.errors[0].reason
    assert "names 3 images and has 1 members" in got.errors[1].reason


def test_members_of_a_tar_that_are_not_read_are_refused_unless_ignored(tmp_path: Path) -> None:
    members = {
        "README.md": b"hello",
        "a.json": {"conversations": TURNS},
        "a.mp4": b"film",
        "b.json": {"conversations": TURNS},
        "b.meta.json": {"width": 4},
        "c.json": {"conversations": TURNS},
    }
    path = write_members(tmp_path / "rows.tar", members)
    got = read(path, tmp_path)
    assert [sample.id for sample in got.samples] == ["c"]
    assert "member a.mp4 is neither JSON nor an image" in got.errors[1].reason
    assert "ignore: [media]" in got.errors[1].reason
    assert "2 JSON members (json, meta.json)" in got.errors[2].reason
    ignoring = read(path, tmp_path, ignore=("media",))
    assert [sample.id for sample in ignoring.samples] == ["a", "b", "c"]
    assert ignoring.errors == ()


@pytest.mark.parametrize("form", ["text", "struct"])
def test_conversations_of_parquet_may_be_json_text_or_a_struct_of_lists(form: str, tmp_path: Path) -> None:
    struct = {"from": ["human", "gpt"], "value": ["what?", "red"]}
    rows = [{"id": "x", "conversations": json.dumps(TURNS) if form == "text" else struct}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (sample,) = read(tmp_path / "rows.parquet", tmp_path).samples
    assert [turn.text for turn in sample.turns] == ["what?", "red"]


def test_an_extracted_image_is_no_link(tmp_path: Path) -> None:
    content = IMAGES["a.png"]
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * len(content))
    row = {"id": "x", "image": {"bytes": content, "path": None}, "question": "q", "answer": "a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (sample,) = read(tmp_path / "rows.parquet", tmp_path).samples
    file = tmp_path / "extracted" / sample.images[0].removeprefix("extracted/")
    file.unlink()
    file.symlink_to(secret)
    read(tmp_path / "rows.parquet", tmp_path)
    assert not file.is_symlink()
    assert file.read_bytes() == content
