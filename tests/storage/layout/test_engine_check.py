"""What a manifest says of the dump's engine: sealed with the parts, kept by later seals, read back by a cache."""

from __future__ import annotations

from pathlib import Path

from storage.layout.documents import EngineCheckEntry, Manifest, parse_document
from storage.layout.error_summaries import summarize_errors
from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import FAMILIES, make_identity, make_part

PASSED = EngineCheckEntry(
    state="passed",
    engine="vllm 1",
    model="transformers 5",
    dtype="bfloat16",
    num_samples=16,
    max_kl=0.01,
    families={"response": (summarize_errors("kl", [1e-4, 2e-4]), summarize_errors("total_variation", [0.01, 0.02]))},
)


def open_written(folder: Path) -> CacheWriter:
    writer = CacheWriter.open(folder, make_identity(num_parts=2), FAMILIES)
    for part in sorted({0, 1} - writer.committed_parts()):
        writer.write_part(part, make_part(part))
    return writer


def test_the_check_of_a_dump_is_sealed_and_read_back(tmp_path: Path) -> None:
    open_written(tmp_path).seal(PASSED)
    content = (tmp_path / "manifest.json").read_bytes()
    assert parse_document(content, Manifest, "manifest.json").engine_check == PASSED
    assert Cache.open(tmp_path).engine_checks() == {0: PASSED}
    assert verify(tmp_path).problems == []


def test_a_cache_that_is_sealed_keeps_the_check_of_the_dump_that_wrote_it(tmp_path: Path) -> None:
    open_written(tmp_path).seal(PASSED)
    before = (tmp_path / "manifest.json").read_bytes()
    for later in (None, EngineCheckEntry(state="off")):
        open_written(tmp_path).seal(later)
        assert (tmp_path / "manifest.json").read_bytes() == before
    writer = open_written(tmp_path)
    writer.unseal()  # a part is to be written again
    writer.seal(EngineCheckEntry(state="off"))
    assert Cache.open(tmp_path).engine_checks()[0].state == "off"
    (tmp_path / "manifest.json").write_bytes(before[:-9])
    open_written(tmp_path).seal()
    assert Cache.open(tmp_path).engine_checks() == {}


def test_a_manifest_without_a_check_says_nothing_of_it(tmp_path: Path) -> None:
    open_written(tmp_path).seal()
    assert b"engine_check" not in (tmp_path / "manifest.json").read_bytes()
    assert Cache.open(tmp_path).engine_checks() == {}


def test_added_families_have_a_check_of_their_own(tmp_path: Path) -> None:
    first = CacheWriter.open(tmp_path, make_identity(num_parts=1), ("response",))
    first.write_part(0, make_part(0, families=("response",)))
    first.seal(PASSED)
    added = CacheWriter.open(tmp_path, make_identity(num_parts=1), ("response", "visual"))
    added.write_part(0, make_part(0, families=("visual",)))
    added.seal(EngineCheckEntry(state="off"))
    found = Cache.open(tmp_path).engine_checks()
    assert [found[number].state for number in (0, 1)] == ["passed", "off"]
    assert verify(tmp_path).problems == []
