"""Images inside a zip or tar, looked up by member name.

A name never becomes a path on this machine.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from storage.errors import ConfigError
from teacher_dump.data.sample import SampleRefusedError, shorten
from teacher_dump.data.sources.row import BrokenRow, make_printable
from teacher_dump.data.sources.webdataset_rows import MAX_MEMBER_BYTES, read_member


class Archive(Protocol):
    """Files by name."""

    def read(self, name: str) -> bytes:
        """Returns a member's content. Raises SampleRefusedError if it is missing or cannot be used."""
        ...


def open_archive(path: Path) -> Archive:
    """Opens a zip or tar and reads its names. Raises ConfigError for any other file."""
    try:
        if zipfile.is_zipfile(path):
            return ZipArchive(path)
        if tarfile.is_tarfile(path):
            return TarArchive(path)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"data.sources: images {path}: cannot be read: {error}") from error
    raise ConfigError(f"data.sources: images {path}: is neither a folder nor a zip or tar")


class ZipArchive:
    """Members of a zip."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)

    def read(self, name: str) -> bytes:
        """See Archive."""
        try:
            info = self._zip.getinfo(name)
            if info.file_size > MAX_MEMBER_BYTES:
                raise SampleRefusedError(
                    f"image {shorten(name)} has {info.file_size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
                )
            with self._zip.open(info) as file:
                content = file.read(MAX_MEMBER_BYTES + 1)
        except KeyError as error:
            raise SampleRefusedError(f"image {shorten(name)} is missing in {self._zip.filename}") from error
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, zlib.error) as error:
            raise SampleRefusedError(
                f"image {shorten(name)}: cannot be read: {error}"
            ) from error  # RuntimeError: encrypted
        if len(content) > MAX_MEMBER_BYTES:
            raise SampleRefusedError(f"image {shorten(name)} has more than {MAX_MEMBER_BYTES:,} bytes")
        return content


class TarArchive:
    """Members of a tar. To read an earlier member, a compressed tar is read again from its start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path, "r:*")  # noqa: SIM115
        self._members = {member.name.removeprefix("./"): member for member in self._tar if not member.isdir()}

    def read(self, name: str) -> bytes:
        """See Archive."""
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            raise SampleRefusedError(f"image {shorten(make_printable(name))} is missing in {self._path}")
        content = read_member(self._tar, member)
        if isinstance(content, BrokenRow):
            raise SampleRefusedError(f"image {shorten(make_printable(name))}: {content.reason}")
        return content
