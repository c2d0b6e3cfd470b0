"""Resolves images of rows to files: finds those of a folder, and writes all others to a folder once.

The rest of Stillhouse, trainers included, reads images as files below one root. Bytes in a row or archive
become files named by their sha256, so equal images share one file.
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
    """Resolves each image of the rows to a file; remembers what it has resolved or written."""

    def __init__(self, extracted: Path) -> None:
        """`extracted`: absolute; the folder for images that are not files yet."""
        self._extracted = extracted
        self._known: dict[tuple[int, str], str] = {}  # by the place's identity and the name in it
        self._written: dict[str, str] = {}  # by sha256
        self._known_folders: dict[tuple[Path, str], str] = {}
        self.folders: dict[Path, None] = {}  # that images are in

    def resolve(self, value: Any, place: Path | Archive) -> str:
        """Returns the absolute path of an image that a row names or holds.

        `value`: a name relative to `place`, bytes, a data: or file: URL, or {bytes, path} as Hugging Face has it.
        Links in a folder are followed wherever they lead. Raises SampleRefusedError if the value is none of
        these, the file is missing, or its name leads out of its folder.
        """
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            value = _parse_url(value)
        if isinstance(value, bytes):
            return self._extract(value)
        if not isinstance(value, str) or not value:
            raise SampleRefusedError(f"image is {shorten(value)}, expected a path, bytes, or a list of them")
        key = (id(place), value)
        known = self._known.get(key)
        if known is None:
            found = _find_in_folder(self, value, place) if isinstance(place, Path) else self._extract(place.read(value))
            known = self._known[key] = found
        return known

    def _extract(self, content: bytes) -> str:
        if not content:
            raise SampleRefusedError("image has no bytes")
        sha256 = hashlib.sha256(content).hexdigest()
        known = self._written.get(sha256)
        if known is None:
            self.folders[self._extracted] = None
            known = self._written[sha256] = _write_once(self._extracted / sha256[:_DIGITS] / sha256, content)
        return known

    def resolve_folder(self, folder: Path, name: str) -> str:
        """Returns a folder below `folder`, with a slash: its real path if that is below `folder`, else its name."""
        known = self._known_folders.get((folder, name))
        if known is None:
            found = f"{os.path.realpath(folder / name)}/"
            if not found.startswith(_make_prefix(folder)):
                found = f"{folder / name}/"
            known = self._known_folders[folder, name] = found
        return known


def _parse_url(value: str) -> str | bytes:
    """Returns the bytes of a data: URL, the path in a file: URL, and other text unchanged.

    Raises SampleRefusedError for any other URL.
    """
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
        raise SampleRefusedError(f"image {shorten(value)} is not a valid data: URL: it has no comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise SampleRefusedError(f"image {shorten(value)} is not a valid data: URL: its base64 is broken") from error


def _find_in_folder(files: ImageFiles, name: str, folder: Path) -> str:
    """Returns the absolute path of a file below a folder; a link that leads out of it keeps its own name."""
    prefix = _make_prefix(folder)
    shown = shorten(name)
    try:
        if (name.startswith("/") and not name.startswith(prefix)) or ".." in name.split("/"):  # may lead anywhere
            found = os.path.realpath(folder / name)
            if not found.startswith(prefix):
                raise SampleRefusedError(f"image {shown} lies outside of its folder {folder}")
        else:
            parent, _, base = name.removeprefix(prefix).rpartition("/")
            found = files.resolve_folder(folder, parent) + base
            if not stat.S_ISREG(os.lstat(found).st_mode):
                target = os.path.realpath(found)
                found = target if target.startswith(prefix) else found
        mode = os.stat(found).st_mode  # noqa: PTH116
    except FileNotFoundError as error:
        raise SampleRefusedError(f"image {shown} is missing in {folder}") from error
    except OSError as error:
        raise SampleRefusedError(f"image {shown}: {error.strerror}") from error
    except ValueError as error:
        raise SampleRefusedError(f"image {shown}: {error}") from error
    if not stat.S_ISREG(mode):
        raise SampleRefusedError(f"image {shown} is missing in {folder}: the path is not a regular file")
    try:
        check_image_path(found[len(prefix) :])
    except ValueError as error:
        raise SampleRefusedError(f"image {shown} is not a relative path with forward slashes") from error
    files.folders[folder] = None
    return found


def _make_prefix(folder: Path) -> str:
    return f"{folder}/".replace("//", "/")


def _write_once(path: Path, content: bytes) -> str:
    """Writes the file unless it exists, and returns its path. The name is the hash: same size means whole."""
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
