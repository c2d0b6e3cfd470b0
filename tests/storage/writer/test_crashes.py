"""Writers that are killed at any moment, and disks that fill up: nothing half is committed, the next run goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.backends.folder import LocalFolder, is_temporary
from storage.errors import CacheError
from storage.layout import commits as layout
from storage.layout.segments import read_segments
from storage.verify.scan_cache import verify
from tests.storage.killed_writers import NUM_APPENDED, NUM_PARTS, grow

REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 600.0  # with a writer that takes a second on an idle machine
NUM_FULL_DISKS = 30
DISK_BYTES = 1 << 20


@pytest.fixture(scope="module")
def undisturbed_cache(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    grow(folder)
    assert verify(folder).problems == []
    return read_files(folder)


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count_whole_commits(folder: Path) -> int:
    """Every commit in the cache, after its files were compared with it to the byte."""
    local = LocalFolder(folder)
    if "cache.json" not in local.list_files():
        return 0
    num_commits = 0
    for segment in read_segments(local):
        for part in layout.list_committed_parts(local, segment):
            commit, _ = layout.read_commit(local, segment, part)
            for entry in commit.families.values():
                layout.check_file(local, entry, content=True)
            num_commits += 1
        layout.read_manifest(local, segment)
    return num_commits


@pytest.mark.parametrize("num_kills", [20, pytest.param(200, marks=[pytest.mark.ci, pytest.mark.slow])])
def test_kills_at_random_moments_lose_and_double_nothing(tmp_path, undisturbed_cache, num_kills):
    rng, rounds, kills, kills_of_round, seen = random.Random(0), 0, 0, [0], set()
    writers_process = subprocess.Popen(
        [sys.executable, "-m", "tests.storage.killed_writers", tmp_path], cwd=REPOSITORY, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert writers_process.stdin is not None
    assert writers_process.stdout is not None
    before, started, whole_s = 0, 0.0, 0.0
    while kills < num_kills or before:
        patience = 1 + kills_of_round[-1] / 10  # a machine that has become slower gets on all the same
        limit_s = rng.uniform(0, 0.5 * whole_s * patience)
        if (kills == 1 and rounds == 0) or kills >= num_kills:  # the second is left alone, and its time taken
            started, limit_s = time.monotonic(), PATIENCE_S
        writers_process.stdin.write(f"{limit_s}\n")
        writers_process.stdin.flush()
        answer = writers_process.stdout.readline().strip()
        folder = tmp_path / str(rounds)
        if answer == "done":
            assert read_files(folder) == undisturbed_cache
            whole_s = whole_s or time.monotonic() - started
            rounds, before = rounds + 1, 0
            kills_of_round.append(0)
            continue
        assert answer == "killed"
        kills += 1
        kills_of_round[-1] += 1
        now = count_whole_commits(folder)
        assert now >= before
        before = now
        seen.add(now)
    writers_process.stdin.close()
    assert writers_process.wait(PATIENCE_S) == 0
    writers_process.stdout.close()
    assert rounds >= 2
    assert len(seen) >= 2
    if num_kills == 200:
        assert rounds >= 3
        assert max(kills_of_round) >= 5
        assert len(seen) >= 2 * NUM_PARTS + NUM_APPENDED - 2  # they fell into nearly every part of every segment


def run_writer_to_error(folder: Path) -> str:
    """What a writer says that cannot go on; empty if it could."""
    try:
        grow(folder)
    except CacheError as error:
        return str(error)
    return ""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB in memory, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a tmpfs; the limit on file sizes is tested all the same")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_commits_nothing_half_and_the_next_run_goes_on(small_disk, undisturbed_cache):
    folder, ballast = small_disk / "cache", small_disk / "ballast"
    rng, before, failures = random.Random(1), 0, 0
    for _ in range(NUM_FULL_DISKS):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(max(0, free - 4096 * rng.randrange(6))))
        message = run_writer_to_error(folder)
        ballast.unlink()
        if message:
            failures += 1
            assert f"{folder}/" in message
            assert "cannot be written: No space left on device; free space there" in message
            assert "run the same command again: committed parts are kept" in message
        assert not any(is_temporary(path.name) for path in folder.rglob("*"))
        now = count_whole_commits(folder)
        assert now >= before
        before = now
    assert failures >= 5
    grow(folder)
    assert read_files(folder) == undisturbed_cache
    assert verify(folder).problems == []


def test_a_file_that_grows_too_large_for_the_system_is_the_same(tmp_path, undisturbed_cache):
    """RLIMIT_FSIZE: the kernel refuses the write in the middle of a file, as a quota does."""
    folder, before, failures = tmp_path / "cache", 0, 0
    code = (
        "import resource, sys; from storage.errors import CacheError; from tests.storage.killed_writers import grow\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try: grow(sys.argv[1])\n"
        "except CacheError as error: sys.exit(str(error))"
    )
    for limit in (100, 1000, 2500, 5000, 10_000, 1 << 20):
        done = subprocess.run(
            [sys.executable, "-c", code, folder, str(limit)],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            failures += 1
            assert "cannot be written: File too large; free space there" in done.stderr
            assert f"{folder}/" in done.stderr
        assert not any(is_temporary(path.name) for path in folder.rglob("*"))
        now = count_whole_commits(folder)
        assert now >= before
        before = now
    assert failures >= 3
    assert read_files(folder) == undisturbed_cache
