"""Samples: LLaVA-format JSON and JSONL files, read and checked; nothing is lost in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from storage.errors import ConfigError, StillhouseError
from storage.records import SampleError, check_image_path
from teacher_dump.config import SourceSection

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class SampleRefusedError(StillhouseError):
    """One sample that cannot be used; the message is the reason that its SampleError carries."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, its text as the file has it, `<image>` markers included."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation about any number of images."""

    id: str
    split: str
    category: str  # "" where the file names none
    images: tuple[str, ...]  # paths relative to the image root, forward slashes
    turns: tuple[Turn, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a fingerprint or another process."""
        return {
            "id": self.id,
            "split": self.split,
            "category": self.category,
            "images": list(self.images),
            "turns": [[turn.role, turn.text] for turn in self.turns],
        }

    @staticmethod
    def from_json(row: dict[str, Any]) -> Sample:
        """The inverse of `as_json`."""
        turns = tuple(Turn(role, text) for role, text in row["turns"])
        return Sample(row["id"], row["split"], row["category"], tuple(row["images"]), turns)


@dataclass(frozen=True)
class SampleSet:
    """What the sources hold: usable samples in file order, and every row that is not one."""

    samples: tuple[Sample, ...]
    errors: tuple[SampleError, ...]
    image_root: Path  # absolute; the folder that all sources' image folders lie in


def read_samples(sources: Sequence[SourceSection]) -> SampleSet:
    """All samples of all sources.

    A broken row, a duplicate id, a missing image or a path out of its image folder costs that sample only
    and becomes a SampleError, under its id or, where that is unknown or taken, under its place in the file.
    ConfigError: no sources, a file that is missing or is no JSON.
    """
    if not sources:
        raise ConfigError("data.sources: is empty; name at least one LLaVA-format JSON or JSONL file")
    folders = [_image_folder(source) for source in sources]
    root = _common_folder(folders)
    reading = _Reading(root)
    for source, folder in zip(sources, folders, strict=True):
        for number, (place, row) in enumerate(_rows(Path(source.path))):
            if source.limit is not None and number >= source.limit:
                break
            reading.take(row, place=place, number=number, source=source, folder=folder)
    return SampleSet(tuple(reading.samples), _renamed(reading.errors, reading.first_place), root)


@dataclass
class _Reading:
    """Rows become samples or errors; ids and image files are looked at once."""

    root: Path
    samples: list[Sample] = field(default_factory=list)
    errors: list[SampleError] = field(default_factory=list)
    first_place: dict[str, str] = field(default_factory=dict)  # by sample id
    checked: dict[tuple[Path, str], str] = field(default_factory=dict)  # image path in its root, or SampleRefusedError

    def take(self, row: Any, *, place: str, number: int, source: SourceSection, folder: Path) -> None:
        sample_id = place
        try:
            if isinstance(row, _Broken):
                raise SampleRefusedError(row.reason)
            if not isinstance(row, dict):
                raise SampleRefusedError(f"row is {type(row).__name__}, expected an object")
            given = f"{Path(source.path).stem}:{number}" if source.ids == "position" else _id(row)
            if given in self.first_place:
                raise SampleRefusedError(
                    f"duplicate id {given!r}, first seen at {self.first_place[given]}; that one is kept "
                    "(`ids: position` numbers the rows of a source instead)"
                )
            sample_id = given
            self.first_place[sample_id] = place
            images = tuple(self._image(path, folder) for path in _image_paths(row))
            self.samples.append(Sample(sample_id, source.split, _category(row), images, _turns(row)))
        except SampleRefusedError as refusal:
            self.errors.append(SampleError(sample_id, f"{place}: {refusal}"))

    def _image(self, path: str, folder: Path) -> str:
        known = self.checked.get((folder, path))
        if known is None:
            known = self.checked[folder, path] = self._path_in_root(path, folder)
        return known

    def _path_in_root(self, path: str, folder: Path) -> str:
        try:
            resolved = (folder / path).resolve()
            exists = resolved.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            raise SampleRefusedError(f"image {path!r}: {error}") from error
        if not resolved.is_relative_to(folder):
            raise SampleRefusedError(f"image {path!r} lies outside of its folder {folder}")
        if not exists:
            raise SampleRefusedError(f"image {path!r} is missing in {folder}")
        try:
            return check_image_path(resolved.relative_to(self.root).as_posix())
        except ValueError as error:
            raise SampleRefusedError(str(error)) from error


def _renamed(errors: Sequence[SampleError], taken: Container[str]) -> tuple[SampleError, ...]:
    """The errors, with any place that happens to be some sample's id marked so that no two ids are the same."""
    return tuple(
        replace(error, sample_id=f"row {error.sample_id}")
        if error.sample_id in taken and error.reason.startswith(f"{error.sample_id}: ")
        else error
        for error in errors
    )


@dataclass(frozen=True)
class _Broken:
    """A line that is no JSON."""

    reason: str


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a JSON array or of JSON lines; a broken line is a `_Broken`."""
    try:
        with path.open("rb") as file:
            first = file.read(1024).lstrip()[:1]
            file.seek(0)
            if first == b"[":
                yield from _array(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{_short(path)}:{number}", _line(line)
    except OSError as error:
        raise ConfigError(f"data.sources: {path}: {error.strerror}") from error


def _array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.sources: {path}: is not valid JSON: {error}") from error
    for number, row in enumerate(rows):
        yield f"{_short(path)}[{number}]", row


def _short(path: Path) -> str:
    """Folder and file name: the same wherever the data set lies, since it ends up in the plan's fingerprint."""
    return "/".join(path.resolve().parts[-2:])


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Broken(f"is not valid JSON: {error}")


def _id(row: dict[str, Any]) -> str:
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise SampleRefusedError(f"id is {value!r}, expected text or a number")
    return _encodable(str(value), "id")


def _category(row: dict[str, Any]) -> str:
    value = row.get("category", "")
    if not isinstance(value, str):
        raise SampleRefusedError(f"category is {value!r}, expected text")
    return _encodable(value, "category")


def _encodable(text: str, place: str) -> str:
    """The text itself; JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleRefusedError(f"{place} is no valid Unicode: {error}") from error
    return text


def _image_paths(row: dict[str, Any]) -> list[str]:
    value = row.get("image")
    paths = [] if value is None else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise SampleRefusedError(f"image is {path!r}, expected a path or a list of paths")
        _encodable(path, "image")
    return paths


def _turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise SampleRefusedError("conversations is missing or empty")
    turns = []
    for number, message in enumerate(conversation):
        if not isinstance(message, dict):
            raise SampleRefusedError(f"turn {number} is {type(message).__name__}, expected an object")
        role, text = _ROLES.get(str(message.get("from"))), message.get("value")
        if role is None:
            raise SampleRefusedError(f"turn {number} is from {message.get('from')!r}, expected human, gpt or system")
        if not isinstance(text, str):
            raise SampleRefusedError(f"turn {number} has the value {text!r}, expected text")
        turns.append(Turn(role, _encodable(text, f"turn {number}")))
    roles = [turn.role for turn in turns if turn.role != "system"]
    if "system" in [turn.role for turn in turns[1:]]:
        raise SampleRefusedError("a system turn must come first")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise SampleRefusedError("turns must alternate between human and gpt, from a question to an answer")
    return tuple(turns)


def _image_folder(source: SourceSection) -> Path:
    return Path(source.images if source.images is not None else Path(source.path).parent).resolve()


def _common_folder(folders: Sequence[Path]) -> Path:
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError as error:  # two drives
        raise ConfigError(f"data.sources: image folders share no folder: {error}") from error
    if len(set(folders)) > 1 and common == Path(common.anchor):
        shown = ", ".join(sorted({str(folder) for folder in folders}))
        raise ConfigError(f"data.sources: image folders share no folder below {common}: {shown}")
    return common
