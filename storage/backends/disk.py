"""Free disk space, checks that a path is writable, and messages for failed writes."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import ConfigError, StillhouseError, WriteError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ESTALE)
# Texts for a full disk in libraries that raise no OSError: safetensors and other Rust code, and PyTorch's
# C++ writer, which only notices a short write.
_FULL_TEXTS = tuple(text for number in FULL for text in (os.strerror(number), f"(os error {number})"))
_SHORT_WRITES = ("PytorchStreamWriter failed", "inline_container.cc")
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
_OPEN_FAILED = "open file failed with strerror: "  # PyTorch's writer, when it cannot create a file
LITTLE_BYTES = 1 << 20  # with less free space, a full disk is assumed for failures without an error code


def format_bytes(size: float) -> str:
    """Formats a size in decimal units, with a number of at least 1: 1,536 -> "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def find_existing_parent(path: str | Path) -> Path:
    """Returns the path itself if it exists, else the closest parent that exists."""
    path = Path(path).absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def measure_free_bytes(path: str | Path) -> int | None:
    """Returns the free bytes on the disk of `path`, existing or not; None if the file system cannot tell."""
    try:
        found = os.statvfs(find_existing_parent(path))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def check_writable(path: str | Path, *, field: str) -> None:
    """Raises ConfigError unless `path` is or can become a folder that accepts files. Creates nothing.

    `field`: the configuration field that holds the path, for the message.
    """
    place = find_existing_parent(path)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in FULL:
            raise ConfigError(
                f"{field} is {path}: its disk is full; free space there, or give another folder"
            ) from error
        reason = error.strerror if place.is_dir() else f"{place} is not a folder"
        raise ConfigError(f"{field} is {path}: it cannot be written: {reason}; give another folder") from error


@contextmanager
def explain_write_errors(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns the errors of failed writes in the block into a WriteError that names `path`.

    Other errors and StillhouseErrors pass unchanged.
    """
    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        reason = _find_reason(error)
        if reason is None:
            raise
        raise WriteError(_format_message(path, reason, is_full=is_full(error), needed_bytes=needed_bytes)) from error


def is_full(error: BaseException) -> bool:
    """Returns True if an error or its cause is a full disk, an exceeded quota or a file size limit."""
    return any(_is_full_error(each) for each in _list_causes(error))


def describe_full_disk(error: BaseException, places: Iterable[str | Path] = ()) -> str | None:
    """Returns a message for an error that a full disk caused; None for all other errors.

    `places`: further paths whose disks may be full.
    """
    if not is_full(error):
        return None
    found = next(each for each in _list_causes(error) if _is_full_error(each))
    if isinstance(found, OSError) and isinstance(found.filename, str):
        return _format_message(found.filename, _describe_full_error(found), is_full=True)
    candidates = ["", *(os.environ.get(name, "") for name in ("TMPDIR", "HOME")), "/tmp", "/dev/shm", *places]
    low = [f"{place or Path.cwd()} has {format_bytes(free)} free" for place, free in _find_low_disks(candidates)]
    where = f" ({', '.join(low)})" if low else ""
    reason = _describe_full_error(found)
    return f"a file cannot be written: {reason}{where}; free space there, and run the same command again"


def report_full_disk(error: Exception, *, prefix: str = "error: ") -> int:
    """Writes the message of `describe_full_disk` to stderr and returns exit code 1; re-raises other errors.

    Call it at the end of a command: any library may be the one that finds the disk full.
    """
    message = describe_full_disk(error)
    if message is None:
        raise error
    sys.stderr.write(f"{prefix}{message}\n")
    return 1


def suggest_freeing_space(path: str | Path) -> str:
    """Returns advice for the message of a failed process if the disk of its log `path` is full, else ""."""
    free = measure_free_bytes(path)
    if free is None or free >= LITTLE_BYTES:
        return ""
    return f"; {format_bytes(free)} are free on its disk: free space there, and run the same command again"


def _find_low_disks(places: Iterable[str | Path]) -> Iterator[tuple[str | Path, int]]:
    devices: set[int] = set()
    for place in places:
        free = measure_free_bytes(place)
        device = find_existing_parent(place).stat().st_dev
        if free is not None and free < LITTLE_BYTES and device not in devices:
            devices.add(device)
            yield place, free


def _format_message(path: str | Path, reason: str, *, is_full: bool, needed_bytes: int | None = None) -> str:
    if not is_full:
        return f"{path}: cannot be written: {reason}; fix the folder or its permissions, and run the same command again"
    free = measure_free_bytes(path)
    facts = [] if free is None else [f"{format_bytes(free)} are free there"]
    facts += [] if needed_bytes is None else [f"{format_bytes(needed_bytes)} are needed"]
    shown = f" ({', '.join(facts)})" if facts else ""
    return f"{path}: cannot be written: {reason}{shown}; free space there, and run the same command again"


def _find_reason(error: Exception) -> str | None:
    """Returns why a write failed; None if the error is not about writing."""
    if isinstance(error, OSError) and error.errno in (*FULL, *_REFUSED):
        return error.strerror or str(error)
    if is_full(error):
        return _describe_full_error(next(each for each in _list_causes(error) if _is_full_error(each)))
    numbers = map(_find_error_number, _list_causes(error))
    return next((os.strerror(number) for number in numbers if number in _REFUSED), None)


def _describe_full_error(full: BaseException) -> str:
    if isinstance(full, OSError) and full.strerror:
        return full.strerror
    if _find_error_number(full) is None and any(text in str(full) for text in _SHORT_WRITES):
        return "only a part of the file was written"
    return _read_first_line(full)


def _is_full_error(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    if (number := _find_error_number(error)) is not None:
        return number in FULL
    return any(text in str(error) for text in (*_FULL_TEXTS, *_SHORT_WRITES))


def _find_error_number(error: BaseException) -> int | None:
    """Returns the error number that a library's message names; None if it names no known one."""
    text = str(error)
    if (found := _RUST_NUMBER.search(text)) is not None:
        return int(found[1])
    return next((number for number in (*FULL, *_REFUSED) if _OPEN_FAILED + os.strerror(number) in text), None)


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _read_first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
