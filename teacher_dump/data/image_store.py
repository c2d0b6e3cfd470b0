"""Images of rows as files: those of a folder are looked at, all others are written to a folder, once.

The rest of Stillhouse, a trainer included, knows images as files below one root. Bytes in a row or in an archive
become files named by their sha256, so that equal images are one, wherever they came from.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from storage.backends.disk import explain_write_errors
from storage.records.records import check_image_path
from teacher_dump.data.archives import Archive
from teacher_dump.data.sample import SampleRefusedError, shorten

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://|data:", re.IGNORECASE)
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

        `value`: a name relative to `place`, bytes, a data: or file: URL, or {bytes, path} as Hugging Face has it.
        Links in a folder are followed wherever they lead. SampleRefusedError: it is none of these, is missing, or
        its name leads out of its folder.
        """
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            value = _of_url(value)
        if isinstance(value, bytes):
            return self._extract(value)
        if not isinstance(value, str) or not value:
            raise SampleRefusedError(f"image is {shorten(value)}, expected a path, bytes, or a list of them")
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
        """A folder below `folder`, with a slash: where links lead, if that is below it, too; else by its name."""
        known = self._directories.get((folder, name))
        if known is None:
            found = f"{os.path.realpath(folder / name)}/"
            if not found.startswith(_inside(folder)):
                found = f"{folder / name}/"
            known = self._directories[folder, name] = found
        return known


def _of_url(value: str) -> str | bytes:
    """The bytes of a data: URL, the name in a file: URL, any other text as it is. SampleRefusedError: another URL."""
    scheme = _ADDRESS.match(value)
    if scheme is None:
        return value
    kind = (scheme[1] or "data").lower()
    if kind == "file":
        name = value[len("file://") :]
        return unquote(name.removeprefix("localhost") if name.startswith("localhost/") else name)
    if kind != "data":
        raise SampleRefusedError(f"image {shorten(value)} is an address; expected a file, bytes, or a data: URL")
    head, comma, payload = value.partition(",")
    if not comma:
        raise SampleRefusedError(f"image {shorten(value)} is no data: URL: it has no comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise SampleRefusedError(f"image {shorten(value)} is no data: URL: its base64 is broken") from error


def _in_folder(files: ImageFiles, name: str, folder: Path) -> str:
    """The absolute path of a file below a folder; a link keeps its own name where it leads out of the folder."""
    inside = _inside(folder)
    shown = shorten(name)
    try:
        if (name.startswith("/") and not name.startswith(inside)) or ".." in name.split("/"):  # may lead anywhere
            found = os.path.realpath(folder / name)
            if not found.startswith(inside):
                raise SampleRefusedError(f"image {shown} lies outside of its folder {folder}")
        else:
            parent, _, base = name.removeprefix(inside).rpartition("/")
            found = files.directory(folder, parent) + base
            if not stat.S_ISREG(os.lstat(found).st_mode):
                target = os.path.realpath(found)
                found = target if target.startswith(inside) else found
        mode = os.stat(found).st_mode  # noqa: PTH116
    except FileNotFoundError as error:
        raise SampleRefusedError(f"image {shown} is missing in {folder}") from error
    except OSError as error:
        raise SampleRefusedError(f"image {shown}: {error.strerror}") from error
    except ValueError as error:
        raise SampleRefusedError(f"image {shown}: {error}") from error
    if not stat.S_ISREG(mode):
        raise SampleRefusedError(f"image {shown} is missing in {folder}: what has its name is no file")
    try:
        check_image_path(found[len(inside) :])
    except ValueError as error:
        raise SampleRefusedError(f"image {shown} is no relative path with forward slashes") from error
    files.folders[folder] = None
    return found


def _inside(folder: Path) -> str:
    return f"{folder}/".replace("//", "/")


def _written(path: Path, content: bytes) -> str:
    """The path, once a file of this content is there. Its name is its hash: one of the same size is whole."""
    with explain_write_errors(path, needed_bytes=len(content)):
        if path.is_file() and not path.is_symlink() and path.stat().st_size == len(content):
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return str(path)
