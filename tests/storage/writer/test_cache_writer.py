import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage.backends.folder import LocalFolder, is_temporary
from storage.errors import CacheError, CorruptPartError, IdentityError
from storage.layout import commits as layout
from storage.layout.segments import read_segments
from storage.reader.cache import Cache
from storage.records.records import PartRecords, SampleError
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.synthetic_cache import (
    FAMILIES,
    SAMPLES_PER_PART,
    make_identity,
    make_part,
    write_cache,
)

REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 600.0  # with a process that takes two seconds on an idle machine


def start_writer(folder, *options):
    command = [sys.executable, "-m", "tests.storage.synthetic_cache", folder, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_succeeds(process):
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr.decode()


def assert_commits_are_whole(folder):
    """Promise 1, read with nothing but the standard library's and the layout's own readers."""
    if not (folder / "cache.json").exists():
        return 0
    local, num_commits = LocalFolder(folder), 0
    for segment in read_segments(local):
        for part in layout.list_committed_parts(local, segment):
            commit, _ = layout.read_commit(local, segment, part)
            for entry in commit.families.values():
                layout.check_file(local, entry, content=True)
            num_commits += 1
    return num_commits


def test_a_writer_killed_before_any_file_operation_loses_and_doubles_nothing(tmp_path):
    num_parts, rng = 3, random.Random(0)
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    write_cache(undisturbed, num_parts=num_parts)
    deaths = 0
    while True:
        process = start_writer(folder, "--parts", num_parts, "--die-at", rng.randint(1, 40))
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert_commits_are_whole(folder)
        if process.returncode == 0:
            break
        assert process.returncode == -9, stderr.decode()
        deaths += 1
        assert deaths < 30
    assert deaths >= 3
    assert read_files(folder) == read_files(undisturbed)
    assert verify(folder).problems == []


def test_a_writer_killed_at_random_moments_loses_and_doubles_nothing(tmp_path):
    num_parts, rng = 150, random.Random(1)
    folder = tmp_path / "cache"
    seen = 0
    for _ in range(3):
        process = start_writer(folder, "--parts", num_parts, "--wait-before-part", num_parts - 1)
        deadline = time.monotonic() + PATIENCE_S
        while count_commits(folder) <= min(seen, num_parts - 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "nothing was committed"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen = assert_commits_are_whole(folder)
    assert 0 < seen < num_parts
    assert_succeeds(start_writer(folder, "--parts", num_parts))
    undisturbed = tmp_path / "undisturbed"
    write_cache(undisturbed, num_parts=num_parts)
    assert read_files(folder) == read_files(undisturbed)


def count_commits(folder):
    """Without those that are being written: a writer that is killed now leaves them behind."""
    return sum(not is_temporary(name) for name in LocalFolder(folder).list_files("commits"))


def test_two_writers_with_different_bytes_leave_one_record_for_each_sample(tmp_path):
    num_parts = 12
    folder, signal = tmp_path / "cache", tmp_path / "go"
    options = ("--parts", num_parts, "--start-when", signal)
    processes = [start_writer(folder, "--noise", noise, *options) for noise in (1, 2)]
    while len(list(tmp_path.glob("go.ready-*"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    signal.touch()
    for process in processes:
        assert_succeeds(process)
    report = verify(folder)
    assert report.problems == []
    assert report.notes == []
    cache = Cache.open(folder)
    assert sorted(cache.sample_ids) == sorted(
        f"sample-{part}-{sample}" for part in range(num_parts) for sample in range(SAMPLES_PER_PART)
    )
    winners = Counter()
    for part in range(num_parts):
        got = cache.read(cache.index_of(f"sample-{part}-0")).response
        assert got is not None
        for noise in (1, 2):
            written = make_part(part, noise=noise).response
            winners[noise] += written is not None and np.array_equal(got.ids, written[0].ids)
    assert sum(winners.values()) == num_parts  # each part is wholly of one of the two


def test_writing_is_deterministic(tmp_path):
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b")
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_a_committed_part_is_never_written_again(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=1), FAMILIES)
    first = writer.write_part(0, make_part(0))
    before = read_files(tmp_path)
    assert writer.write_part(0, make_part(0, noise=1)) == first
    assert read_files(tmp_path) == before


def test_sealing_a_sealed_cache_changes_nothing(tmp_path):
    writer = write_cache(tmp_path)
    manifest = tmp_path / "manifest.json"
    before = (manifest.stat().st_mtime_ns, manifest.stat().st_ino)
    again = CacheWriter.open(tmp_path, make_identity(), FAMILIES)
    assert again.seal() == writer.seal()
    assert (manifest.stat().st_mtime_ns, manifest.stat().st_ino) == before


def test_sealing_names_the_missing_parts(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=14), FAMILIES)
    writer.write_part(1, make_part(1))
    with pytest.raises(CacheError, match=r"13 of 14 parts are not committed: 0, 2, 3, .*, …"):
        writer.seal()
    assert not (tmp_path / "manifest.json").exists()


def test_sealing_deletes_what_killed_writers_left_and_nothing_else(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=1), FAMILIES)
    writer.write_part(0, make_part(0))
    whole = read_files(tmp_path)
    litter = [
        "tokens/part-00000.0123456789ab.parquet",
        "tokens/part-00000.0123456789ab.parquet.tmp-12-ab12",
        "commits/part-00000.json.tmp-12-ab12",
    ]
    for name in litter:
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "tokens" / "notes.txt").write_text("a user's own file")
    writer.seal()
    assert set(read_files(tmp_path)) == {*whole, "manifest.json", "tokens/notes.txt"}
    assert verify(tmp_path).notes == ["tokens/notes.txt: belongs to no part"]


def test_a_sample_id_in_two_parts_is_refused_at_sealing(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=2), ())
    for part in range(2):
        writer.write_part(part, make_part(0, families=()))
    with pytest.raises(CacheError, match="parts 0 and 1 both hold sample 'sample-0-0'"):
        writer.seal()


def test_another_identity_is_refused_naming_each_field(tmp_path):
    write_cache(tmp_path)
    before = read_files(tmp_path)
    other = make_identity(teacher="big", teacher_fingerprint="z" * 8, tau=0.5)
    with pytest.raises(IdentityError) as caught:
        CacheWriter.open(tmp_path, other, ("response",))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "teacher_fingerprint: cache has 'aaaaaaaa', this run has 'zzzzzzzz'" in message
    assert "'big'" not in message  # a place
    assert "selection.response.tau: cache has 0.03, this run has 0.5" in message
    assert "delete" not in message
    assert "undo the change, or set cache.path to another folder" in message
    assert read_files(tmp_path) == before


def test_the_order_of_families_does_not_matter(tmp_path):
    CacheWriter.open(tmp_path, make_identity(), ("visual", "response"))
    assert CacheWriter.open(tmp_path, make_identity(), ("response", "visual")).segment.families == (
        "response",
        "visual",
    )


def test_other_families_are_refused_while_a_dump_is_not_finished(tmp_path):
    CacheWriter.open(tmp_path, make_identity(), ("response", "visual"))
    with pytest.raises(IdentityError, match=r"families: cache has \('response', 'visual'\), this run has \('visual',"):
        CacheWriter.open(tmp_path, make_identity(), ("visual",))


def test_unknown_families_are_refused(tmp_path):
    with pytest.raises(CacheError, match="unknown families"):
        CacheWriter.open(tmp_path, make_identity(), ("horoscope",))
    assert read_files(tmp_path) == {}


def test_a_committed_part_whose_file_was_cut_or_removed_is_named(tmp_path):
    writer = write_cache(tmp_path)
    assert writer.committed_parts() == {0, 1}
    victim = next((tmp_path / "visual").glob("part-00001*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CorruptPartError, match=f"{victim.name}: has .* bytes.*run the dump again"):
        writer.committed_parts()
    victim.unlink()
    with pytest.raises(CorruptPartError, match=f"{victim.name}: cannot be read"):
        writer.committed_parts()
    (tmp_path / "commits" / "part-00001.json").unlink()
    assert writer.committed_parts() == {0}
    writer.write_part(1, make_part(1))
    writer.seal()
    assert verify(tmp_path).problems == []


def spoil_tokens(part, **changes):
    return dataclasses.replace(part, tokens=[dataclasses.replace(part.tokens[0], **changes), *part.tokens[1:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda part: dataclasses.replace(part, relation=None), "relation: the records and the cache"),
        (lambda part: dataclasses.replace(part, errors=[SampleError("sample-0-1", "?")]), "more than once"),
        (lambda part: dataclasses.replace(part, tokens=[*part.tokens, part.tokens[0]]), "more than once"),
        (lambda part: dataclasses.replace(part, response=part.response[1:]), "5 responses for 6 samples"),
        (
            lambda part: dataclasses.replace(part, response=part.response[::-1]),
            "sample-0-1: 0 response rows for 4",
        ),
        (
            lambda part: dataclasses.replace(
                part, response=[dataclasses.replace(rows, label_logprob=None) for rows in part.response]
            ),
            "each with a label logprob",
        ),
        (
            lambda part: dataclasses.replace(part, visual={}),
            "visual: 4 image keys are missing, 0 are unknown",
        ),
        (
            lambda part: dataclasses.replace(part, relation={**part.relation, "x": next(iter(part.relation.values()))}),
            "relation: 0 image keys are missing, 1 are unknown",
        ),
        (
            lambda part: dataclasses.replace(part, visual={key: rows.slice(0, 1) for key, rows in part.visual.items()}),
            "visual: image .* has 1 rows for 4",
        ),
        (lambda part: spoil_tokens(part, images=()), "sample-0-0: 1 image placeholders for 0 images"),
        (
            lambda part: spoil_tokens(part, token_ids=np.full(8, 300, np.int32), response_mask=np.zeros(8, bool)),
            "sample-0-0: token id 300 is outside 0..299",
        ),
        (lambda part: spoil_tokens(part, response_mask=np.zeros(3, bool)), "must be int32"),
        (
            lambda part: spoil_tokens(part, token_ids=part.tokens[0].token_ids.astype(np.int64)),
            "sample-0-0: token_ids int64",
        ),
    ],
)
def test_contradictory_records_are_refused_and_nothing_is_written(tmp_path, spoil, message):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=1), FAMILIES)
    before = read_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        writer.write_part(0, spoil(make_part(0)))
    assert read_files(tmp_path) == before


def test_a_part_that_is_not_of_the_plan_is_refused(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=1), ())
    for part in (-1, 1):
        with pytest.raises(ValueError, match="outside the plan, which has parts 0 to 0"):
            writer.write_part(part, make_part(0, families=()))


def test_a_part_of_errors_alone_is_a_part(tmp_path):
    writer = CacheWriter.open(tmp_path, make_identity(num_parts=2), FAMILIES)
    writer.write_part(0, PartRecords([], [], {}, {}, [SampleError("a", "no image \udc80"), SampleError("b", "?")]))
    writer.write_part(1, make_part(1))
    writer.seal()
    assert verify(tmp_path).problems == []
    cache = Cache.open(tmp_path)
    assert cache.num_samples == SAMPLES_PER_PART
    assert [error.sample_id for error in cache.errors] == ["a", "b", "broken-1"]
    assert cache.read(0).tokens.sample_id == "sample-1-0"


def test_a_plan_of_no_parts_makes_an_empty_cache(tmp_path):
    write_cache(tmp_path, num_parts=0)
    assert verify(tmp_path).problems == []
    assert Cache.open(tmp_path).statistics()["num_samples"] == 0
