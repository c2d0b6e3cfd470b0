"""Reads WebDataset tars: the members of one base name are one row, its JSON with its images' bytes.

If the JSON names members, they are the row's images, in that order; else all images are, in the tar's order.
Members are read one after another and never become files by their own name.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from teacher_dump.data.image_loading import MAX_IMAGE_BYTES
from teacher_dump.data.message_lists import parse_list
from teacher_dump.data.sample import shorten
from teacher_dump.data.sources.json_rows import parse_json
from teacher_dump.data.sources.row import BrokenRow, SourceRows, make_printable, shorten_name, shorten_path
from teacher_dump.data.unread_fields import Ignored

_LOGGER = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
MAX_MEMBER_BYTES = MAX_IMAGE_BYTES
_BLOCK = 512
_MAX_KEY = 200  # characters of a place


class TarReader:
    """Reads the tars of one source."""

    def __init__(self, ignored: Ignored = frozenset()) -> None:
        self._ignores_media = "media" in ignored
        self._has_warned = False

    def read_rows(self, path: Path) -> SourceRows:
        """Yields rows of one tar, compressed or not.

        An unusable row becomes a BrokenRow, as does the end of a cut archive. Raises ConfigError if it is
        not a tar.
        """
        try:
            tar = tarfile.open(path, "r:*")  # noqa: SIM115
        except (OSError, tarfile.TarError, EOFError) as error:
            raise ConfigError(f"data.sources: {path}: cannot be read as a tar: {error}") from error
        with tar:
            group: _RowMembers | None = None
            for member in _iterate_members(tar):
                if isinstance(member, BrokenRow):
                    if group is not None:  # more members of it may be lost
                        group.broken = member.reason
                    yield from self._make_rows(path, group)
                    yield f"{shorten_path(path)}/(end)", member
                    return
                key, _, suffix = _split_name(member.name)
                if group is None or group.key != key:
                    yield from self._make_rows(path, group)
                    group = _RowMembers(key)
                group.add_member(tar, member, suffix, ignores_media=self._ignores_media)
            yield from self._make_rows(path, group)

    def _make_rows(self, path: Path, group: _RowMembers | None) -> SourceRows:
        if group is None or group.has_only_ignored:
            return
        row = group.make_row(ignores_media=self._ignores_media)
        if group.is_unordered and not self._has_warned and not isinstance(row, BrokenRow):
            self._has_warned = True
            _LOGGER.warning(
                "data.sources: %s: the images of %s lie in the order %s, which is not that of their numbers; the order "
                "of the archive is kept: name the members in the JSON's images to have another",
                path, shorten_name(group.key), ", ".join(shorten_name(name) for name in list(group.images)[:5]),
            )  # fmt: skip
        yield f"{shorten_path(path)}/{make_printable(group.key)[:_MAX_KEY]}", row


@dataclass
class _RowMembers:
    """The members of one row."""

    key: str
    documents: dict[str, Any] = field(default_factory=dict)  # by suffix: JSON, parsed
    images: dict[str, bytes] = field(default_factory=dict)  # by name
    broken: str = ""
    num_left_out: int = 0
    is_unordered: bool = False  # images are in the tar's order, and their numbers say another

    def add_member(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, *, ignores_media: bool) -> None:
        """Reads one member into the row."""
        kind = suffix.rpartition(".")[2].lower()
        if kind != "json" and kind not in IMAGE_SUFFIXES:
            self.num_left_out += 1
            if not ignores_media:
                self._mark_broken(
                    f"member {shorten_name(member.name)} is neither JSON nor an image ({', '.join(IMAGE_SUFFIXES)}); "
                    "`ignore: [media]` of its source leaves such members out"
                )
            return
        content = read_member(tar, member)
        if isinstance(content, BrokenRow):
            self._mark_broken(content.reason)
        elif kind == "json":
            self.documents[suffix] = parse_json(content)
        elif member.name in self.images:
            self._mark_broken(f"member {shorten_name(member.name)} is there twice")
        else:
            self.images[member.name] = content

    @property
    def has_only_ignored(self) -> bool:
        """Whether all members are ignored by the source's `ignore`."""
        return not self.broken and not self.documents and not self.images and self.num_left_out > 0

    def make_row(self, *, ignores_media: bool) -> Any:
        """Returns the row with its images as bytes, or a BrokenRow."""
        if self.broken:
            return BrokenRow(self.broken)
        if not self.documents:
            return BrokenRow("has no .json member")
        row = next(iter(self.documents.values()))
        if len(self.documents) > 1:
            if not (ignores_media and "json" in self.documents):
                names = ", ".join(shorten_name(suffix) for suffix in self.documents)
                return BrokenRow(f"has {len(self.documents)} JSON members ({names}), expected one")
            row = self.documents["json"]
        if not isinstance(row, dict):
            return row
        row = {"id": make_printable(self.key), **row}
        return self._attach_images(row) if self.images else row

    def _attach_images(self, row: dict[str, Any]) -> Any:
        given = row.get("images") if row.get("images") is not None else row.get("image")
        listed = parse_list(given, "images") if isinstance(given, str) else given
        named = listed if isinstance(listed, list) else [] if listed is None else [listed]
        own = {name: value for name, value in row.items() if name not in ("image", "images")}
        if not named:
            replaced = self._replace_items(own)
            return replaced if replaced != own else {**own, "images": self._list_in_tar_order()}
        found = [self._find_member(value) for value in named]
        if all(content is not None for content in found):
            return {**own, "images": found}
        if any(content is not None for content in found):
            missing = next(value for value, content in zip(named, found, strict=True) if content is None)
            return BrokenRow(f"image {shorten(missing)} is none of its members")
        if len(named) != len(self.images):
            return BrokenRow(f"names {len(named)} images and has {len(self.images)} members, none of them by that name")
        return {**own, "images": self._list_in_tar_order()}  # names of where the images came from

    def _find_member(self, value: Any) -> bytes | None:
        """Returns the member that a value names: by full name, beside the JSON, or by what follows the key."""
        name = value.get("path") if isinstance(value, dict) else value
        if not isinstance(name, str):
            return None
        name = name.removeprefix("./")
        folder = self.key.rpartition("/")[0]
        names = {stored.removeprefix("./"): stored for stored in self.images}
        prefixes = ("", f"{folder}/".removeprefix("./") if folder else "", f"{self.key}.".removeprefix("./"))
        stored = next((names[prefix + name] for prefix in prefixes if prefix + name in names), None)
        if stored is None:
            bases = [stored for short, stored in names.items() if short.rpartition("/")[2] == name.rpartition("/")[2]]
            stored = bases[0] if len(bases) == 1 else None
        return None if stored is None else self.images[stored]

    def _replace_items(self, value: Any) -> Any:
        """Returns the value, with bytes in place of members' names in items of messages."""
        if isinstance(value, list):
            return [self._replace_items(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") in ("image", "image_url", "input_image"):
            for name in ("image", "path", "url", "image_url"):
                inner = value.get(name)
                content = self._find_member(inner.get("url") if isinstance(inner, dict) else inner)
                if content is not None:
                    return {**value, name: content}
            return value
        return {name: self._replace_items(item) for name, item in value.items()}

    def _list_in_tar_order(self) -> list[bytes]:
        numbers = [re.findall(r"[0-9]+", name.removeprefix(self.key).rpartition(".")[0]) for name in self.images]
        if all(numbers):
            ordered = [[int(number) for number in of_member] for of_member in numbers]
            self.is_unordered = ordered != sorted(ordered)
        return list(self.images.values())

    def _mark_broken(self, reason: str) -> None:
        self.broken = self.broken or reason


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | BrokenRow:
    """Returns the content of a member; a BrokenRow if it is not a plain file, too large or cut."""
    name = shorten_name(member.name)
    if not member.isreg():
        return BrokenRow(f"member {name} is not a plain file")
    if member.size > MAX_MEMBER_BYTES:
        return BrokenRow(f"member {name} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    try:
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        return BrokenRow(f"member {name} cannot be read: {error}")
    if len(content) != member.size:
        return BrokenRow(f"member {name} has {len(content):,} of {member.size:,} bytes; the archive was cut")
    return content


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | BrokenRow]:
    """Yields the members that are not folders; last a BrokenRow if the archive has no end block.

    tarfile itself takes a damaged header for the end, and would silently lose what follows.
    """
    while True:
        try:
            member = tar.next()
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            yield BrokenRow(f"the archive cannot be read any further: {error}")
            return
        if member is None:
            break
        tar.members = []  # type: ignore[misc]  # or every header stays in memory
        if not member.isdir():
            yield member
    if not _has_end_block(tar):
        yield BrokenRow("the archive is damaged or was cut here; nothing after this can be read")


def _has_end_block(tar: tarfile.TarFile) -> bool:
    assert tar.fileobj is not None
    try:
        tar.fileobj.seek(tar.offset)
        return tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except (OSError, EOFError, ValueError):
        return False


def _split_name(name: str) -> tuple[str, str, str]:
    """Returns (key, dot, suffix): splits at the first dot of the base name, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return folder + slash + key, dot, suffix
