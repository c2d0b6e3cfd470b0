"""Images of rows as files: those of a folder are looked at, all others are written to a folder, once.

The rest of Stillhouse, a trainer included, knows images as files below one root. Bytes in a row or in an archive
become files named by their sha256, so that equal images are one, wherever they came from.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from storage.disk import explain_write_errors
from storage.records import check_image_path
from teacher_dump.archives import Archive
from teacher_dump.samples import SampleRefusedError

_DIGITS = 2  # of the hash that name a folder


class ImageFiles:
    """Where each image of the rows is a file. Nothing is looked at or written twice."""

    def __init__(self, extracted: Path) -> None:
        """`extracted`: absolute; the folder for images that are no files."""
        self._extracted = extracted
        self._known: dict[tuple[int, str], str] = {}  # by the place's identity and the name in it
        self._written: dict[str, str] = {}  # by sha256
        self._directories: dict[tuple[Path, str], str] = {}
        self.folders: dict[Path, None] = {}  # that images are in

    def file(self, value: Any, place: Path | Archive) -> str:
        """The absolute path of an image that a row names or holds.

        `value`: a name relative to `place`, bytes, or {bytes, path} as Hugging Face has it. SampleRefusedError:
        it is none of these, is missing, or lies outside of its folder.
        """
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return self._extract(value)
        if not isinstance(value, str) or not value:
            raise SampleRefusedError(f"image is {_short(value)}, expected a path, bytes, or a list of them")
        key = (id(place), value)
        known = self._known.get(key)
        if known is None:
            found = _in_folder(self, value, place) if isinstance(place, Path) else self._extract(place.read(value))
            known = self._known[key] = found
        return known

    def _extract(self, content: bytes) -> str:
        if not content:
            raise SampleRefusedError("image has no bytes")
        sha256 = hashlib.sha256(content).hexdigest()
        known = self._written.get(sha256)
        if known is None:
            self.folders[self._extracted] = None
            known = self._written[sha256] = _written(self._extracted / sha256[:_DIGITS] / sha256, content)
        return known

    def directory(self, folder: Path, name: str) -> str:
        """A folder below `folder`, its links followed, with a slash: they are followed once for all of its files."""
        known = self._directories.get((folder, name))
        if known is None:
            known = self._directories[folder, name] = f"{os.path.realpath(folder / name)}/"
        return known


def _in_folder(files: ImageFiles, name: str, folder: Path) -> str:
    """The absolute path of a file below a folder, whatever links lead to it."""
    try:
        parent, _, base = name.rpartition("/")
        if name.startswith("/") or ".." in name:  # which may lead anywhere, and back
            found = os.path.realpath(folder / name)
        else:
            found = files.directory(folder, parent) + base
        mode = os.lstat(found).st_mode
        if not stat.S_ISREG(mode):
            found = os.path.realpath(found)
            mode = os.lstat(found).st_mode  # no link is left
    except FileNotFoundError as error:
        raise SampleRefusedError(f"image {name!r} is missing in {folder}") from error
    except (OSError, ValueError) as error:
        raise SampleRefusedError(f"image {name!r}: {error}") from error
    inside = f"{folder}/".replace("//", "/")
    if not found.startswith(inside):
        raise SampleRefusedError(f"image {name!r} lies outside of its folder {folder}")
    if not stat.S_ISREG(mode):
        raise SampleRefusedError(f"image {name!r} is missing in {folder}: what has its name is no file")
    try:
        check_image_path(found[len(inside) :])
    except ValueError as error:
        raise SampleRefusedError(str(error)) from error
    files.folders[folder] = None
    return found


def _written(path: Path, content: bytes) -> str:
    """The path, once a file of this content is there. Its name is its hash: one of the same size is whole."""
    with explain_write_errors(path, needed_bytes=len(content)):
        if path.is_file() and path.stat().st_size == len(content):
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return str(path)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
