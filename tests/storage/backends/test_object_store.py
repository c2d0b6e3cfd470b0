"""Caches in an object store, over HTTP: the S3 endpoint is moto's, on loopback, with trouble injected."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage.backends.folder import open_folder
from storage.backends.object_store import ObjectFolder, shared_store
from storage.errors import CacheError, CorruptPartError
from storage.processes.waiting import send_notices_to
from storage.reader.cache import Cache
from storage.records.records import PartRecords, TokensRecord
from storage.records.sample_key import SampleKey
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from tests.storage.family_cache import make_image_file, make_output_head, write_family_cache
from tests.storage.synthetic_cache import FAMILIES, SAMPLES_PER_PART, make_identity, make_part, write_cache

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from tests.storage.s3_server import BUCKET, Trouble, set_s3_environment, set_silent_s3

REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 600.0  # with a process that takes some seconds on an idle machine


@pytest.fixture(scope="module")
def endpoint():
    with set_s3_environment() as trouble:
        yield trouble


@pytest.fixture
def trouble(endpoint: Trouble):
    endpoint.calm()
    yield endpoint
    endpoint.calm()


@pytest.fixture
def url(trouble: Trouble, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/caches/{request.node.name.partition('[')[0]}"


def list_objects(url):
    folder = open_folder(url)
    return {name: folder.read(name) for name in folder.list_files(deep=True)}


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_writer(url, *options):
    command = [sys.executable, "-m", "tests.storage.synthetic_cache", url, *options]
    return subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )


def test_a_cache_in_a_bucket_is_the_cache_in_a_folder(url, tmp_path):
    write_cache(url)
    write_cache(tmp_path)
    assert list_objects(url) == read_files(tmp_path)
    report = verify(url)
    assert report.problems == report.notes == []
    assert report.num_samples == 2 * SAMPLES_PER_PART
    remote, local = Cache.open(url), Cache.open(tmp_path)
    assert remote.sealed
    assert remote.statistics() == local.statistics()
    for index in np.random.default_rng(0).permutation(remote.num_samples):
        a, b = remote.read(int(index)), local.read(int(index))
        assert a.response is not None
        assert b.response is not None
        assert a.response.equals(b.response)
        assert a.visual.keys() == b.visual.keys()
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.read(3).tokens.sample_id == local.read(3).tokens.sample_id


def test_a_dump_is_resumed_sealed_and_extended(url):
    writer = CacheWriter.open(url, make_identity(), ("response",))
    writer.write_part(1, make_part(1, families=("response",)))
    assert not Cache.open(url).sealed
    assert Cache.open(url).num_samples == SAMPLES_PER_PART
    again = CacheWriter.open(url, make_identity(), ("response",))
    assert again.committed_parts() == {1}
    with pytest.raises(CacheError, match=f"{url}: 1 of 2 parts are not committed: 0"):
        again.seal()
    again.write_part(0, make_part(0, families=("response",)))
    again.seal()
    adding = CacheWriter.open(url, make_identity(), FAMILIES)
    for part in range(2):
        adding.write_part(part, make_part(part, families=("visual", "relation")))
    adding.seal()
    plan = {"plan_fingerprint": "f", "num_parts": 1}
    appending = CacheWriter.open(url, make_identity(**plan), FAMILIES, append=True)
    appending.write_part(0, make_part(2))
    appending.seal()
    assert verify(url).problems == []
    cache = Cache.open(url)
    assert cache.families == ("tokens", *FAMILIES)
    assert cache.num_samples == 3 * SAMPLES_PER_PART


def test_hidden_states_head_and_images_in_a_bucket_are_those_in_a_folder(url, trouble, tmp_path):
    writer = write_family_cache(url)
    write_family_cache(tmp_path)
    assert list_objects(url) == read_files(tmp_path)
    report = verify(url)
    assert report.problems == report.notes == []
    trouble.calm()
    writer.put_head(make_output_head())
    assert trouble.requests["PUT"] == 0  # the head is there
    cache = Cache.open(url)
    trouble.calm()
    index = cache.index_of("1-shared")
    sha256 = cache.read(index).tokens.images[0].sha256
    assert cache.image_bytes(index, sha256) == make_image_file(1, 0)
    read = trouble.requests["GET"]
    np.testing.assert_array_equal(cache.head().weight, make_output_head().weight)
    assert trouble.requests["GET"] == read + 1
    folder = open_folder(url)
    folder.write(folder.list_files("head")[0], b"other")
    with pytest.raises(CorruptPartError, match=rf"{url}/head/head\..*: has 5 bytes"):
        cache.head()
    assert any("has 5 bytes" in problem for problem in verify(url).problems)
    writer.put_head(make_output_head())
    assert verify(url).problems == []


def test_rows_are_read_by_ranges(url, trouble):
    """The index costs its columns, and a sample its row group, 64 samples: not the file."""
    rng, num_samples, num_tokens = np.random.default_rng(0), 256, 8000
    mask = np.zeros(num_tokens, bool)
    tokens = [
        TokensRecord(SampleKey(f"sample-{n}"), "train", "", rng.integers(8, 300, num_tokens, dtype=np.int32), mask)
        for n in range(num_samples)
    ]
    writer = CacheWriter.open(url, make_identity(num_parts=1), ())
    size = writer.write_part(0, PartRecords(tokens)).families["tokens"].file_bytes
    assert size > 2 << 20
    trouble.calm()
    cache = Cache.open(url)
    assert trouble.bytes_sent < size / 10
    trouble.calm()
    np.testing.assert_array_equal(cache.read(100).tokens.token_ids, tokens[100].token_ids)
    assert size / 5 < trouble.bytes_sent < size / 3
    assert trouble.requests["GET"] == 1
    cache.read(101)
    assert trouble.requests["GET"] == 1  # the row group is kept


def test_of_many_conditional_writers_one_wins(url):
    """What commits rely on: s3fs sends If-None-Match, the server answers 412, and we say False."""
    folder = open_folder(url)
    assert folder.create("x", b"first")
    assert not folder.create("x", b"second")
    assert folder.read("x") == b"first"
    folder.write("x", b"third")
    assert folder.read("x") == b"third"
    with pytest.raises(FileNotFoundError):
        folder.read("y")
    assert folder.list_files("nothing") == []
    folder.remove("y")


def test_two_writers_with_different_bytes_leave_one_record_for_each_sample(url, tmp_path):
    num_parts, signal = 6, tmp_path / "go"
    options = ("--parts", num_parts, "--start-when", signal)
    processes = [start_writer(url, "--noise", noise, *options) for noise in (1, 2)]
    while len(list(tmp_path.glob("go.ready-*"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    signal.touch()
    for process in processes:
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, stderr.decode()
    report = verify(url)
    assert report.problems == report.notes == []
    cache = Cache.open(url)
    assert sorted(cache.sample_ids) == sorted(f"sample-{part}-{n}" for part in range(num_parts) for n in range(6))


def test_a_busy_store_that_loses_answers_changes_nothing(url, trouble, tmp_path):
    """503 before, and 500 after the work was done: an own commit whose answer was lost is adopted."""
    write_cache(tmp_path, num_parts=3)
    trouble.busy_fraction, trouble.lost_fraction = 0.1, 0.1
    write_cache(url, num_parts=3)
    assert verify(url).problems == []
    assert Cache.open(url).read(5).tokens.sample_id == "sample-0-5"
    assert trouble.num_busy >= 3
    assert trouble.num_lost >= 3
    trouble.calm()
    assert list_objects(url) == read_files(tmp_path)


def test_a_slow_store_is_waited_for(url, trouble):
    trouble.delay_s = 0.1
    writer = CacheWriter.open(url, make_identity(num_parts=1), ())
    writer.write_part(0, make_part(0, families=()))
    writer.seal()
    started = time.monotonic()
    cache = Cache.open(url)
    assert time.monotonic() - started > 0.1 * 3  # cache.json, the manifest, a commit: not at once
    assert cache.num_samples == SAMPLES_PER_PART


def test_a_store_that_stays_broken_is_one_clear_message(url, trouble):
    folder = ObjectFolder(url, pauses_s=(0.01, 0.01))
    trouble.busy_fraction = 1.0
    for step in (lambda: folder.write("x", b"1"), lambda: folder.read("x"), lambda: folder.create("y", b"2")):
        with pytest.raises(CacheError, match=rf"{url}/[xy]: the store failed in 3 attempts: .*(reduce|Unavail)"):
            step()
    trouble.calm()
    trouble.lost_fraction = 1.0
    with pytest.raises(CacheError, match=r"internal error.*committed parts are kept"):
        folder.write("x", b"1")


def test_a_missing_bucket_and_refused_credentials_are_named(url, tmp_path):
    with pytest.raises(CacheError, match="s3://no-such-bucket/x: no cache is here"):
        Cache.open("s3://no-such-bucket/x")
    with pytest.raises(CacheError, match=r"s3://no-such-bucket/x/cache.json: cannot be written: .*create the bucket"):
        CacheWriter.open("s3://no-such-bucket/x", make_identity(), ())
    code = f"from storage.verify.scan_cache import verify; print(verify('{url}').problems[0])"
    nobody = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    empty = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**nobody, **empty},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cache.json: the store refuses: Unable to locate credentials; check the credentials" in done.stdout


def test_an_address_where_nobody_is_is_not_asked_for_a_minute():
    """Two attempts more, some seconds apart; a store that once answered is waited for, a minute and more."""
    code = "from storage.verify.scan_cache import verify; print(verify('s3://bucket/x').problems[0])"
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **nobody},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the store failed in 3 attempts: Could not connect" in done.stdout


def test_a_store_that_never_answers_is_given_up_after_a_time(trouble):
    """Reads, writes (which wait for `100 Continue`), conditional writes and listings, by attempts and in all."""
    steps = {
        "write": lambda folder: folder.write("x", b"1" * 100),
        "create": lambda folder: folder.create("x", b"1"),
        "range": lambda folder: folder.read_range("x", 0, 8),
        "size": lambda folder: folder.size("x"),
        "remove": lambda folder: folder.remove("x"),
    }
    with set_silent_s3():
        for number, step in enumerate(steps.values()):
            url, started = f"s3://{BUCKET}/silent-{number}", time.monotonic()
            with pytest.raises(
                CacheError, match=r"the store failed in \d attempts: no answer in time .*when it answers"
            ):
                step(ObjectFolder(url, pauses_s=(0.01,) * 9, attempt_s=0.2, total_s=0.5))
            assert 0.5 <= time.monotonic() - started < 60


def test_a_read_of_unknown_length_ends_too(trouble, monkeypatch):
    """Its time is long, so the connection's own limit has to end it."""
    with set_silent_s3():
        store = shared_store(f"s3://{BUCKET}/silent", os.getpid())
        limits = store.config_kwargs
        assert 0 < limits["read_timeout"] <= 60
        assert 0 < limits["connect_timeout"] <= 60
        limits["read_timeout"] = 0.2
        with pytest.raises(CacheError, match=r"the store failed in 2 attempts: Read timeout"):
            ObjectFolder(f"s3://{BUCKET}/silent", pauses_s=(0.01,)).read("x")


def test_whoever_waits_for_a_store_says_so(trouble):
    notices = []
    with set_silent_s3(), send_notices_to(notices.append):
        folder = ObjectFolder(f"s3://{BUCKET}/quiet", pauses_s=(), attempt_s=3.0, total_s=3.0, notice_s=0.1)
        with pytest.raises(CacheError, match="the store failed"):
            folder.size("x")
    assert notices
    assert notices[0].startswith(f"still waiting for an answer of s3://{BUCKET}/quiet/x, attempt 1 (")


def test_damage_in_a_bucket_is_found(url):
    write_cache(url)
    folder = open_folder(url)
    name = next(name for name in folder.list_files("visual"))
    content = bytearray(folder.read(name))
    content[len(content) // 2] ^= 1
    folder.write(name, bytes(content))
    assert any(f"{url}/{name}: sha256 is" in problem for problem in verify(url).problems)
    with pytest.raises(CorruptPartError, match="sha256 is"):
        Cache.open(url, checksums=True).read(0)
    folder.remove(name)
    with pytest.raises(CorruptPartError, match=f"{name}: cannot be read"):
        Cache.open(url).read(0)


def test_a_writer_killed_at_random_moments_loses_and_doubles_nothing(url, tmp_path):
    num_parts, rng = 12, random.Random(2)
    folder, seen = open_folder(url), 0
    for _ in range(5):
        process = start_writer(url, "--parts", num_parts, "--wait-before-part", num_parts - 1)
        deadline = time.monotonic() + PATIENCE_S
        while len(folder.list_files("commits")) <= min(seen, num_parts - 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "nothing was committed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        seen = len(folder.list_files("commits"))
        problems = verify(url).problems
        assert all("manifest.json: is missing" in problem for problem in problems), problems
    _, stderr = (process := start_writer(url, "--parts", num_parts)).communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr.decode()
    write_cache(tmp_path, num_parts=num_parts)
    assert list_objects(url) == read_files(tmp_path)


def test_a_cache_is_written_only_where_whole_objects_are(tmp_path):
    with pytest.raises(CacheError, match=r"http://x: a cache can be written to a local folder or s3://"):
        ObjectFolder("http://x").make_folders([])


def test_the_memory_of_a_process_is_a_store_too():
    """Another of fsspec's stores, through the same code."""
    write_cache("memory://somewhere/cache")
    assert verify("memory://somewhere/cache").problems == []
    assert Cache.open("memory://somewhere/cache").num_samples == 2 * SAMPLES_PER_PART
    assert not open_folder("memory://somewhere/cache").create("cache.json", b"")
