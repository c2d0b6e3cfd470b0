"""Segments that take up samples which had failed: what counts afterwards, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.backends.folder import LocalFolder
from storage.errors import CacheError, CorruptPartError
from storage.layout.documents import SegmentDescription, parse_document
from storage.layout.retries import find_or_begin_retry
from storage.reader.cache import Cache
from storage.records.records import PartRecords, SampleError
from storage.records.sample_key import SampleKey
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import FAMILIES, SAMPLES_PER_PART, make_identity, make_part, write_cache

REPOSITORY = Path(__file__).parents[3]
NEW_PLAN = {"plan_fingerprint": "f" * 8, "num_parts": 1}
FAILED = (("broken-0", "broken-1"),)


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mend(sample_ids, *, errors=(), families=FAMILIES, part=9) -> PartRecords:
    """Records under these ids, and these errors."""
    records = make_part(part, families=families, num_samples=len(sample_ids))
    tokens = [
        dataclasses.replace(record, key=SampleKey(sample_id))
        for record, sample_id in zip(records.tokens, sample_ids, strict=True)
    ]
    return dataclasses.replace(records, tokens=tokens, errors=[SampleError(name, "again") for name in errors])


def retry(folder, failed_ids=FAILED, *parts: PartRecords, base: int = 0) -> CacheWriter:
    writer = CacheWriter.begin_retry(folder, make_identity(), base, failed_ids)
    for number, records in enumerate(parts):
        writer.write_part(number, records)
    return writer


def count_contents(folder) -> tuple[int, list[tuple[str, str]]]:
    cache = Cache.open(folder)
    assert cache.statistics()["num_errors"] == len(cache.errors)
    return cache.num_samples, [(error.sample_id, error.reason) for error in cache.errors]


def test_a_sample_that_had_failed_counts_once_as_a_sample_and_one_that_fails_again_once_as_an_error(tmp_path):
    write_cache(tmp_path)
    before = read_files(tmp_path)
    writer = CacheWriter.begin_retry(tmp_path, make_identity(), 0, FAILED)
    assert count_contents(tmp_path) == (
        12,
        [("broken-0", "image is truncated"), ("broken-1", "image is truncated")],
    )
    assert not Cache.open(tmp_path).sealed
    assert any("segment 1 is not sealed" in problem for problem in verify(tmp_path).problems)
    writer.write_part(0, mend(["broken-0"], errors=["broken-1"]))
    writer.seal()
    after = read_files(tmp_path)
    assert {name: after[name] for name in before} == before  # nothing that was there has changed
    assert count_contents(tmp_path) == (13, [("broken-1", "again")])
    cache = Cache.open(tmp_path)
    assert cache.sealed
    assert cache.read(cache.index_of("broken-0")).response is not None
    report = verify(tmp_path)
    assert report.problems == report.notes == []
    assert (report.num_samples, report.num_errors, report.num_segments) == (13, 1, 2)
    first = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    assert first.segment.number == 0
    assert first.contents() == (13, [SampleError("broken-1", "again")])
    retry(tmp_path, [["broken-1"]], mend(["broken-1"], part=8)).seal()  # an error of the retry is taken up in turn
    assert count_contents(tmp_path) == (14, [])
    assert verify(tmp_path).problems == []


def test_a_mended_row_may_have_an_id_where_its_error_had_a_place(tmp_path):
    write_cache(tmp_path)
    retry(
        tmp_path,
        [["broken-1"], ["broken-0"]],
        mend(["new", "new-too"]),
        mend([], errors=["broken-0"]),
    ).seal()
    assert count_contents(tmp_path) == (14, [("broken-0", "again")])
    assert verify(tmp_path).problems == []


def test_an_unfinished_retry_is_joined_and_gives_the_same_bytes(tmp_path):
    parts = [mend(["broken-1"], part=8), mend(["broken-0"], part=9)]
    for name in ("undisturbed", "stopped"):
        write_cache(tmp_path / name)
    retry(tmp_path / "undisturbed", [["broken-1"], ["broken-0"]], *parts).seal()
    retry(tmp_path / "stopped", [["broken-1"], ["broken-0"]], parts[0])
    assert count_contents(tmp_path / "stopped") == (13, [("broken-0", "image is truncated")])
    writer = retry(tmp_path / "stopped", [["broken-0"]])  # as whoever comes later would begin it
    assert (writer.segment.number, writer.committed_parts()) == (1, {0})
    assert writer.write_part(0, mend(["broken-1"], part=5)) == writer.commit_of(0)  # left alone
    writer.write_part(1, parts[1])
    writer.seal()
    assert read_files(tmp_path / "stopped") == read_files(tmp_path / "undisturbed")


def test_a_retry_that_is_killed_at_any_file_operation_resumes_to_the_same_bytes(tmp_path):
    """Killed when its document is there, then between two files of its part; the last run is not killed."""
    script = (
        "import sys; from pathlib import Path; from tests.storage.synthetic_cache import _die_at\n"
        "from tests.storage.layout.test_retries import FAILED, mend, retry\n"
        "folder, moment = sys.argv[1], int(sys.argv[2])\n"
        "records = mend(['broken-0'], errors=['broken-1'])\n"
        "_die_at(moment, folder) if moment else None\n"
        "retry(folder, FAILED, records).seal()\n"
    )
    for name in ("undisturbed", "killed"):
        write_cache(tmp_path / name)
    retry(tmp_path / "undisturbed", FAILED, mend(["broken-0"], errors=["broken-1"])).seal()
    for moment in (6, 20, 0):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "killed", str(moment)],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == (-signal.SIGKILL if moment else 0)
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "undisturbed")


def test_a_part_that_is_written_anew_leaves_a_retry_its_samples(tmp_path):
    """As verification advises where a part's file is broken; its images may be mended by then."""
    write_cache(tmp_path)
    retry(tmp_path, FAILED, mend(["broken-0"], errors=["broken-1"])).seal()
    (tmp_path / "commits/part-00000.json").unlink()
    records = make_part(0)
    again = [dataclasses.replace(records.tokens[0], key=SampleKey("broken-0")), *records.tokens[1:]]
    writer = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    writer.unseal()
    writer.write_part(0, dataclasses.replace(records, tokens=again, errors=[]))
    writer.seal()
    assert count_contents(tmp_path) == (
        12,
        [("broken-1", "again")],
    )  # without sample-0-0, which lent its record
    assert verify(tmp_path).problems == []


def test_samples_are_appended_beside_a_retry_and_failed_ones_are_not_appended(tmp_path):
    write_cache(tmp_path)
    retry(tmp_path, [["broken-0"]], mend(["broken-0"])).seal()
    for name in ("broken-0", "broken-1", "sample-0-0"):
        with pytest.raises(CacheError, match=f"'{name}' is in part .*--retry-errors dumps failed"):
            CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES, append=True, sample_ids=[name])
    writer = CacheWriter.open(tmp_path, make_identity(**NEW_PLAN), FAMILIES, append=True, sample_ids=["new"])
    assert (writer.segment.number, writer.segment.first_part) == (2, 3)
    writer.write_part(0, make_part(20))
    writer.seal()
    retry(tmp_path, [["broken-1"]], mend(["broken-1"], part=8)).seal()
    retry(tmp_path, [["broken-20"]], mend(["broken-20"], part=7), base=2).seal()
    assert count_contents(tmp_path) == (2 * SAMPLES_PER_PART + SAMPLES_PER_PART + 3, [])
    assert verify(tmp_path).problems == []


def test_families_are_added_to_a_retry_as_to_any_parts(tmp_path):
    write_cache(tmp_path, families=("response",))
    retry(tmp_path, [["broken-0"]], mend(["broken-0"], families=("response",))).seal()
    writer = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    for part in range(2):
        writer.write_part(part, make_part(part, families=writer.segment.families))
    writer.seal()
    with pytest.raises(CacheError, match=r"1 of 3 lack it, part 2 first; segment 1 .* was dumped without it"):
        Cache.open(tmp_path, ("visual",))
    of_retry = Cache.open(tmp_path, ()).segments[1].identity
    writer = CacheWriter.open(tmp_path, of_retry.model_copy(update={"selection": make_identity().selection}), FAMILIES)
    assert (writer.segment.adds_to, writer.segment.families) == (1, ("visual", "relation"))
    writer.write_part(0, mend(["broken-0"], families=("visual", "relation")))
    writer.seal()
    cache = Cache.open(tmp_path)
    assert cache.families == ("tokens", *FAMILIES)
    assert cache.read(cache.index_of("broken-0")).visual
    assert verify(tmp_path).problems == []
    later = retry(tmp_path, [["broken-1"]], mend(["broken-1"], part=8))
    assert later.segment.families == FAMILIES  # those that were added since, too
    later.seal()
    assert verify(tmp_path).problems == []


def test_what_is_no_failed_sample_is_not_taken_up(tmp_path):
    write_cache(tmp_path)
    before = read_files(tmp_path)
    for ids in ([["sample-0-0"]], [["nobody"]], [[]], []):
        with pytest.raises(CacheError, match="expected failed samples of segment 0"):
            CacheWriter.begin_retry(tmp_path, make_identity(), 0, ids)
    assert read_files(tmp_path) == before
    retry(tmp_path, [["broken-0"]], mend(["broken-0"])).seal()
    with pytest.raises(CacheError, match="'broken-0': expected failed samples"):  # it is one no longer
        CacheWriter.begin_retry(tmp_path, make_identity(), 0, [["broken-0"]])
    writer = CacheWriter.begin_retry(tmp_path, make_identity(), 0, [["broken-1"]])
    with pytest.raises(ValueError, match="0 records and errors for 1 failed samples"):
        writer.write_part(0, mend([]))
    with pytest.raises(CacheError, match="'sample-1-1' is in part 1"):
        writer.write_part(0, mend(["sample-1-1"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retries": 1}, "retries failed samples of segment 1, which has none"),
        ({"failed_ids": (("a",), ("b",))}, "must list failed samples for each of its 1 parts"),
        ({"failed_ids": (("a", "a"),)}, "must list failed samples for each of its 1 parts"),
    ],
)
def test_a_retry_that_contradicts_itself_is_refused_under_a_right_hash(tmp_path, changes, message):
    write_cache(tmp_path)
    find_or_begin_retry(LocalFolder(tmp_path), make_identity(), 0, FAILED)
    place = tmp_path / "segments/0001.json"
    document = parse_document(place.read_bytes(), SegmentDescription, "?")
    place.write_bytes(document.model_copy(update=changes).to_bytes())
    with pytest.raises(CorruptPartError, match=message):
        Cache.open(tmp_path)


def test_verification_finds_a_retry_of_what_never_failed(tmp_path):
    write_cache(tmp_path)
    retry(tmp_path, [["broken-0"]])
    place = tmp_path / "segments/0001.json"
    document = parse_document(place.read_bytes(), SegmentDescription, "?")
    place.write_bytes(document.model_copy(update={"failed_ids": (("sample-0-0",),)}).to_bytes())
    problems = verify(tmp_path).problems
    assert any("retries 'sample-0-0', which is no error of segment 0" in problem for problem in problems)
    assert any("its plan_fingerprint is not that of its failed_ids" in problem for problem in problems)
