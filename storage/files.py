"""The cache's only access to files: whole reads, atomic writes, exclusive creation. Local folders only."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from pathlib import Path

import pyarrow as pa

from storage.errors import CacheError

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_TEMPORARY = re.compile(r".+\.tmp-\d+-[0-9a-f]+")


def local_folder(path: str | Path) -> Path:
    """A cache's folder; CacheError for a URL, since object storage is not served yet."""
    if "://" in str(path):
        raise CacheError(f"{path}: object storage is not supported yet; give a local folder")
    return Path(path)


def read_bytes(path: Path) -> bytes:
    """A file's content. Errors: FileNotFoundError, OSError."""
    return path.read_bytes()


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_for_arrow(path: Path) -> pa.NativeFile:
    """A file that Arrow reads at random places."""
    return pa.OSFile(str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Make `path` hold `content`: whoever looks, even after a power failure, sees all of it or none."""
    temporary = _write_temporary(path, content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Like write_atomically, but False and no change if the file exists: of many writers one wins."""
    temporary = _write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise CacheError(f"{path}: this file system has no hard links, which commits need") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def is_temporary(path: Path) -> bool:
    """True for what a killed writer may leave behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _write_temporary(path: Path, content: bytes) -> Path:
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
    """Wait until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
