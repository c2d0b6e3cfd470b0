"""File access of a cache: a local folder or an object store, with whole reads, atomic writes and exclusive creation.

A local folder needs hard links; an object store needs conditional writes (object_store.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from storage.backends.disk import FULL, explain_write_errors
from storage.errors import CacheError

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_TEMPORARY = re.compile(r".+\.tmp-\d+-[0-9a-f]+")
_MAX_ATTEMPTS = 3  # of a write whose temporary file another writer removes as a leftover

T = TypeVar("T")


class Folder(Protocol):
    """A cache's folder. Names are relative to it, with forward slashes; `str()` is its path or URL."""

    @property
    def is_remote(self) -> bool:
        """True for an object store, where every access is a network request."""
        ...

    def locate(self, name: str) -> str:
        """Returns a file's full path or URL, for messages."""
        ...

    def make_folders(self, subs: Iterable[str]) -> None:
        """Creates the folder and these sub-folders; an object store has none. Errors: CacheError."""
        ...

    def read(self, name: str) -> bytes:
        """Returns a file's content. Errors: FileNotFoundError, NotADirectoryError, other OSError, CacheError."""
        ...

    def size(self, name: str) -> int:
        """Returns a file's size in bytes. Errors as `read`."""
        ...

    def sha256(self, name: str) -> str:
        """Returns the sha256 of a file's content, in hex. Errors as `read`."""
        ...

    def open_for_arrow(self, name: str, num_bytes: int) -> pa.NativeFile:
        """Opens a file of `num_bytes` bytes for random access by Arrow. Errors as `read`."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically: readers see all of `content` or the previous state. Errors: CacheError."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Creates a file atomically; returns False and changes nothing if it exists. Errors: CacheError."""
        ...

    def list_files(self, sub: str = "", *, deep: bool = False) -> list[str]:
        """Returns the sorted names of the files in a sub-folder (`deep`: also below it); [] if it is missing."""
        ...

    def remove(self, name: str) -> None:
        """Deletes a file if it exists."""
        ...


def open_folder(path: str | Path) -> Folder:
    """Returns the folder at a path or URL without accessing it. CacheError if no driver is installed."""
    protocol, separator, rest = str(path).partition("://")
    if not separator:
        return LocalFolder(Path(path))
    if protocol in ("file", "local"):
        return LocalFolder(Path(rest))
    from storage.backends.object_store import open_object_folder  # fsspec, which local caches need not load

    return open_object_folder(str(path))


def is_url(path: str | Path) -> bool:
    """Returns True for a URL such as s3://bucket/prefix."""
    return "://" in str(path)


@dataclass(frozen=True)
class LocalFolder:
    """A folder in a file system of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_remote(self) -> bool:
        return False

    def locate(self, name: str) -> str:
        return str(self.path / name)

    def make_folders(self, subs: Iterable[str]) -> None:
        try:
            for sub in ("", *subs):
                (self.path / sub).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _make_write_error(self.path, error) from error

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def sha256(self, name: str) -> str:
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open_for_arrow(self, name: str, num_bytes: int) -> pa.NativeFile:
        return pa.OSFile(str(self.path / name))

    def write(self, name: str, content: bytes) -> None:
        self._write_with_retry(self.path / name, lambda path: _write_and_rename(path, content))

    def create(self, name: str, content: bytes) -> bool:
        return self._write_with_retry(self.path / name, lambda path: create_exclusively(path, content))

    def list_files(self, sub: str = "", *, deep: bool = False) -> list[str]:
        found = (self.path / sub).glob("**/*" if deep else "*")
        return sorted(path.relative_to(self.path).as_posix() for path in found if path.is_file())

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _write_with_retry(self, path: Path, step: Callable[[Path], T]) -> T:
        problem: OSError | None = None
        for _ in range(_MAX_ATTEMPTS):
            try:
                return step(path)
            except FileNotFoundError as error:
                problem = error
                if not path.parent.is_dir():
                    break
                # Another writer sealed the cache and removed our temporary file as a leftover: try again.
            except OSError as error:
                raise _make_write_error(path, error) from error
        assert problem is not None
        raise _make_write_error(path, problem) from problem


def _make_write_error(path: Path, error: OSError) -> CacheError:
    advice = "free space there" if error.errno in FULL else "fix the folder or its permissions"
    return CacheError(
        f"{path}: cannot be written: {error.strerror}; {advice}, or set cache.path to another folder, and run the "
        "same command again: committed parts are kept"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically: readers, even after a power failure, see all of `content` or the old file.

    Errors: WriteError for a full disk or a folder that cannot be written; the old file is kept.
    """
    with explain_write_errors(path, needed_bytes=len(content)):
        _write_and_rename(path, content)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON document atomically. Errors: see write_atomically."""
    write_atomically(path, f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())


def _write_and_rename(path: Path, content: bytes) -> None:
    temporary = write_temporary(path, content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Creates a file atomically; returns False and changes nothing if it exists: of many writers one wins."""
    temporary = write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise CacheError(
            f"{path}: this file system has no hard links, which commits need; set cache.path to another file system"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def is_temporary(name: str) -> bool:
    """Returns True for the name of a temporary file, which a killed writer may leave behind."""
    return _TEMPORARY.fullmatch(name) is not None


def write_temporary(path: Path, content: bytes) -> Path:
    """Writes and syncs a temporary file beside `path`, to be renamed or linked to it; returns its path.

    After an error the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
