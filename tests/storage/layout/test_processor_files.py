"""A cache carries what its ids and pixels mean, and its documents have room for what later work needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.backends.folder import open_folder
from storage.errors import CorruptPartError
from storage.layout.documents import Manifest, NamedFile, parse_document
from storage.layout.processor_files import MAX_BYTES, load_processor_files, read_processor_files
from storage.layout.segments import read_segments
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import make_identity

CONTENTS = {"tokenizer.json": b"{}", "preprocessor_config.json": b'{"size": 3}'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    identity = make_identity(num_parts=0)
    CacheWriter.open(tmp_path / "cache", identity, (), processor_files=CONTENTS).seal()
    return tmp_path / "cache"


def test_a_cache_holds_its_tokenizer_and_processor(path):
    folder = open_folder(path)
    (segment,) = read_segments(folder)
    assert load_processor_files(folder, segment.processor_files) == CONTENTS
    report = verify(path)
    assert report.problems == report.notes == []


def test_a_changed_or_missing_processor_file_is_found(path):
    (file,) = path.glob("processor/*.tokenizer.json")
    file.write_bytes(b"[]")
    assert any("sha256 is" in problem for problem in verify(path).problems)
    file.unlink()
    assert any("cannot be read" in problem for problem in verify(path).problems)


@pytest.mark.parametrize(
    ("name", "file"), [("tokenizer.json", "../secret"), ("run.py", "processor/aaaaaaaaaaaa.run.py")]
)
def test_files_elsewhere_and_of_other_names_are_refused(path, name, file):
    entry = NamedFile(name=name, file=file, file_bytes=1, sha256="a" * 64)
    with pytest.raises(CorruptPartError, match="expected a file of processor/"):
        load_processor_files(open_folder(path), [entry])


def test_code_and_weights_of_a_checkpoint_stay_where_they_are(tmp_path):
    for name in ("tokenizer.json", "modeling.py", "model.safetensors", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    assert sorted(read_processor_files(tmp_path)) == ["chat_template.jinja", "tokenizer.json"]


def test_a_manifest_has_room_for_an_index(path):
    index = NamedFile(name="index.parquet", file="index/x.parquet", file_bytes=3, sha256="b" * 64)
    plain = parse_document((path / "manifest.json").read_bytes(), Manifest, "manifest.json")
    manifest = plain.model_copy(update={"index": index})
    assert parse_document(manifest.to_bytes(), Manifest, "manifest.json") == manifest


def test_a_file_that_is_too_large_to_carry_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert read_processor_files(tmp_path) == {}
    assert f"tokenizer.json: has {MAX_BYTES + 1} bytes" in caplog.text
