"""Files of a dump besides the cache, on a full disk: one error, no partial file, and the terminal is restored."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import WriteError
from teacher_dump.data.image_store import ImageFiles
from teacher_dump.teachers.fingerprint import FingerprintMemory
from teacher_dump.workers.log_file import log_output
from tests.small_disk import SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 1 << 20) as found:
        yield found


def test_an_image_on_a_full_disk_is_not_written_in_part(disk: SmallDisk) -> None:
    files = ImageFiles(disk.folder / "images")
    first = files.resolve(bytes(100), disk.folder)
    disk.fill(free_bytes=8192)
    with pytest.raises(WriteError, match=r"images/.*: cannot be written: No space left .*50\.0 kB are needed"):
        files.resolve(bytes(50_000), disk.folder)
    there = [path for path in (disk.folder / "images").rglob("*") if path.is_file()]
    assert there == [Path(first)]
    disk.make_room()
    assert Path(files.resolve(bytes(50_000), disk.folder)).stat().st_size == 50_000


def test_a_cached_fingerprint_survives_a_full_disk(disk: SmallDisk) -> None:
    path, file = disk.folder / "fingerprints.json", disk.folder / "file"
    file.write_bytes(b"1")
    FingerprintMemory(path).recall("a", [file], lambda: "x")
    before = path.read_bytes()
    disk.fill()
    with pytest.raises(WriteError, match=r"fingerprints\.json: cannot be written"):
        FingerprintMemory(path).recall("b", [file], lambda: "x" * 9000)
    assert path.read_bytes() == before


def test_the_terminal_is_restored_after_a_log_on_a_full_disk(disk: SmallDisk, tmp_path: Path) -> None:
    log, screen = disk.folder / "dump.log", os.fstat(1).st_ino
    log.touch()
    disk.fill()
    with log_output(log):
        sys.stdout.write("x" * 9000)
    assert os.fstat(1).st_ino == screen
