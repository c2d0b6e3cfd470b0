"""A write that fails is one sentence with the file, the reason and what to do; what was whole stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from storage.backends.disk import (
    check_writable,
    describe_full_disk,
    explain_write_errors,
    find_existing_parent,
    measure_free_bytes,
    report_full_disk,
)
from storage.backends.folder import write_atomically
from storage.errors import ConfigError, StillhouseError, WriteError
from tests.small_disk import small_disk


def test_a_full_disk_keeps_the_old_file_and_says_what_is_needed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        file = disk.folder / "report.json"
        write_atomically(file, b"old")
        disk.fill(free_bytes=4096)
        with pytest.raises(WriteError) as failed:
            write_atomically(file, bytes(50_000))
        assert str(failed.value) == (
            f"{file}: cannot be written: No space left on device (4.1 kB are free there, 50.0 kB are needed); free "
            "space there, and run the same command again"
        )
        assert file.read_bytes() == b"old"
        assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast", "report.json"]
        disk.make_room()
        write_atomically(file, bytes(50_000))
        assert file.read_bytes() == bytes(50_000)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system; fix the folder"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "os error 28"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "only a part of the file was written",
        ),
    ],
)
def test_errors_of_libraries_that_write_are_explained(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(WriteError, match=f"^{tmp_path}: cannot be written: .*{words}"), explain_write_errors(tmp_path):
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError(errno.ENOENT, "no"), StillhouseError("no")])
def test_other_errors_are_left_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_write_errors(tmp_path):
        raise error
    assert raised.value is error
    assert describe_full_disk(error) is None


def test_a_full_disk_is_found_among_the_causes() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
        except OSError as full:
            raise RuntimeError("the library gave up") from full
    except RuntimeError as error:
        message = describe_full_disk(error)
    assert message is not None
    assert message.startswith("/disk/file: cannot be written: No space left on device")


def test_a_command_ends_with_the_sentence_of_a_full_disk_and_raises_other_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    assert report_full_disk(full) == 1
    assert report_full_disk(full, prefix="stillhouse: ") == 1
    for line, prefix in zip(capsys.readouterr().err.splitlines(), ("error: ", "stillhouse: "), strict=True):
        assert line.startswith(f"{prefix}/disk/file: cannot be written: No space left on device")
    other = KeyError("no")
    with pytest.raises(KeyError) as raised:
        report_full_disk(other)
    assert raised.value is other
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_not_there_yet_is_looked_at_through_its_parents(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert find_existing_parent(deep) == tmp_path
    assert measure_free_bytes(deep) == measure_free_bytes(tmp_path)
    check_writable(deep, field="runs_dir")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").write_text("a file")
    with pytest.raises(ConfigError, match=rf"runs_dir is {deep}: it cannot be written: {tmp_path}/a is not a folder"):
        check_writable(deep, field="runs_dir")
    with pytest.raises(ConfigError, match=r"cache\.path is /proc/x: it cannot be written"):
        check_writable("/proc/x", field="cache.path")


def test_a_place_that_cannot_be_written_is_no_full_disk_whichever_library_says_so(tmp_path: Path) -> None:
    """Here a folder lies where the file belongs; a disk that turns read-only is told in the same way."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.numpy")
    (tmp_path / "taken").mkdir()
    for write in (
        lambda place: safetensors.save_file({"one": np.ones(3)}, place),
        lambda place: torch.save({"one": 1}, place),
    ):
        expected = "place: cannot be written: Is a directory; fix the folder"
        with pytest.raises(WriteError, match=expected) as caught, explain_write_errors("place"):
            write(tmp_path / "taken")
        assert describe_full_disk(caught.value) is None
