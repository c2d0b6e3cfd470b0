"""WebDataset tars: the members of one base name are one row, its JSON with its images' bytes.

Members are read one after another and never become files by their own name.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from teacher_dump.images import MAX_IMAGE_BYTES
from teacher_dump.sources.json_rows import parse_json
from teacher_dump.sources.row import Broken, Rows, printable, short_place

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_MEMBER_BYTES = MAX_IMAGE_BYTES
_BLOCK = 512


def tar_rows(path: Path) -> Rows:
    """Rows of one tar, compressed or not. A row that cannot be used is a Broken, as is the end of one that was cut.

    ConfigError: no tar.
    """
    try:
        tar = tarfile.open(path, "r:*")  # noqa: SIM115
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ConfigError(f"data.sources: {path}: cannot be read as a tar: {error}") from error
    with tar:
        group: _Group | None = None
        for member in _members(tar):
            if isinstance(member, Broken):
                if group is not None:  # nobody knows whether more of it was to come
                    group.broken = member.reason
                yield from _finish(path, group)
                yield f"{short_place(path)}/(end)", member
                return
            key, _, suffix = _split(member.name)
            if group is None or group.key != key:
                yield from _finish(path, group)
                group = _Group(key)
            group.take(tar, member, suffix)
        yield from _finish(path, group)


@dataclass
class _Group:
    """The members of one row."""

    key: str
    row: Any = None
    images: list[bytes] = field(default_factory=list)
    broken: str = ""

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
        kind = suffix.rpartition(".")[2].lower()
        if kind != "json" and kind not in IMAGE_SUFFIXES:
            return
        content = read_member(tar, member)
        if isinstance(content, Broken):
            self.broken = self.broken or content.reason
        elif kind == "json":
            self.row = parse_json(content)
        else:
            self.images.append(content)


def _finish(path: Path, group: _Group | None) -> Rows:
    if group is None:
        return
    place = f"{short_place(path)}/{printable(group.key)}"
    if group.broken:
        yield place, Broken(group.broken)
    elif group.row is None:
        yield place, Broken("has no .json member")
    elif isinstance(group.row, dict):
        own = {name: value for name, value in group.row.items() if name not in ("image", "images")}
        images = {"images": list(group.images)} if group.images else {}
        yield place, {"id": printable(group.key), **(own if images else group.row), **images}
    else:
        yield place, group.row


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Broken:
    """The content of a member that is a plain file of a sensible size."""
    name = printable(member.name)
    if not member.isreg():
        return Broken(f"member {name} is no plain file")
    if member.size > MAX_MEMBER_BYTES:
        return Broken(f"member {name} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    try:
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        return Broken(f"member {name} cannot be read: {error}")
    if len(content) != member.size:
        return Broken(f"member {name} has {len(content):,} of {member.size:,} bytes; the archive was cut")
    return content


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | Broken]:
    """The members that are no folders; last a Broken where the archive does not end as a tar does.

    tarfile itself takes a damaged header for the end, and what follows would be lost in silence.
    """
    while True:
        try:
            member = tar.next()
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            yield Broken(f"the archive cannot be read any further: {error}")
            return
        if member is None:
            break
        tar.members = []  # type: ignore[misc]  # or every header stays in memory
        if not member.isdir():
            yield member
    if not _ends_well(tar):
        yield Broken("the archive is damaged or was cut here; nothing after this can be read")


def _ends_well(tar: tarfile.TarFile) -> bool:
    assert tar.fileobj is not None
    try:
        tar.fileobj.seek(tar.offset)
        return tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except (OSError, EOFError, ValueError):
        return False


def _split(name: str) -> tuple[str, str, str]:
    """(key, dot, suffix): the name up to the first dot of its last part, as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return folder + slash + key, dot, suffix
