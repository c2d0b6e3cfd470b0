"""Reading: the sources' rows as samples, mixed, checked and counted; nothing is lost in silence."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.records.preference_pairs import CHOSEN, REJECTED
from storage.records.records import SampleError, check_image_path
from teacher_dump.config import SourceSection
from teacher_dump.data.archives import Archive, open_archive
from teacher_dump.data.conversation import encodable, is_pair, parse_conversation
from teacher_dump.data.image_store import ImageFiles
from teacher_dump.data.sample import Sample, SampleRefusedError, shorten
from teacher_dump.data.sample_spool import SampleFile
from teacher_dump.data.sources.formats import read_rows
from teacher_dump.data.sources.row import Broken

_MAX_ID = 1000  # characters
_MAX_REASON = 1000  # whatever a library puts into its message


@dataclass(frozen=True)
class SampleSet:
    """What the sources hold: usable samples in their order, and every row that is not one."""

    samples: Sequence[Sample]  # on disk, read as they are asked for
    errors: tuple[SampleError, ...]
    image_root: Path  # absolute; the folder that all images lie in
    rows: Mapping[str, Row] = field(default_factory=dict)  # of the names in `watched`, those of usable samples


@dataclass
class Row:
    """A row that became samples."""

    place: str  # file and number
    sample_ids: list[str]


def read_samples(
    sources: Sequence[SourceSection],
    *,
    extracted: Path,
    only_questions: bool = False,
    spool: Path | None = None,
    watched: Container[str] = (),
) -> SampleSet:
    """All samples of all sources.

    A broken row, a duplicate id, a missing image or a path out of its image folder costs that sample only
    and becomes a SampleError, under its id or, where that is unknown or taken, under its place in the file;
    a preference pair becomes two, under both of its ids. `extracted` is the folder for images that are bytes
    or lie in archives; `only_questions` leaves all answers out; `spool` is the folder of the samples' file.
    `watched`: ids or places of rows whose samples are wanted in `rows`.
    ConfigError: no sources, one that is missing or cannot be read at all.
    """
    if not sources:
        raise ConfigError("data.sources: is empty; name at least one file of conversations, such as a LLaVA JSON")
    reading = _Reading(ImageFiles(extracted.resolve()), only_questions=only_questions, watched=watched)
    samples = SampleFile(_samples(sources, reading), folder=spool)
    root = _common_folder(list(reading.files.folders) or [_image_folder(sources[0])])
    samples.cut_paths(len(str(root).rstrip("/")) + 1)
    return SampleSet(samples, _named_once(reading.errors, reading.first_place), root, reading.rows)


def _samples(sources: Sequence[SourceSection], reading: _Reading) -> Iterator[Sample]:
    for source, name in zip(sources, _position_names(sources), strict=True):
        images = _image_place(source)
        number = None
        columns = _Columns(source)
        for number, copy, (place, row) in islice(_taken(source), source.limit):
            given = f"{name}:{number}" if source.ids == "position" else None
            yield from reading.take(row, place=place, given=given, copy=copy, columns=columns, images=images)
        if number is None and (num_rows := sum(1 for _ in read_rows(source))):
            raise ConfigError(
                f"data.sources: {source.path}: weight {source.weight:g} takes none of its {num_rows:,} rows; "
                "give a larger weight, or another seed"
            )
        if source.limit is None and source.weight >= 1:  # every row was seen
            columns.check_all_seen()


def _position_names(sources: Sequence[SourceSection]) -> list[str]:
    """What `ids: position` calls each source: its file's name, and from the second of one name on its count."""
    counts: Counter[str] = Counter()
    names = []
    for source in sources:
        stem = Path(source.path).stem
        counts[stem] += source.ids == "position"
        names.append(stem if counts[stem] < 2 else f"{stem}@{counts[stem]}")
    return names


class _Columns:
    """A source's own names for our fields."""

    def __init__(self, source: SourceSection) -> None:
        self.source = source
        self._unseen = set(source.columns.values())
        self._fields: dict[str, None] = {}  # of the first row

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under our names; what a name is mapped from is left out."""
        if not self.source.columns:
            return dict(row)
        self._unseen.difference_update(row)
        self._fields = self._fields or dict.fromkeys(row)
        kept = {name: value for name, value in row.items() if name not in self.source.columns.values()}
        return {**kept, **{ours: row.get(theirs) for ours, theirs in self.source.columns.items()}}

    def check_all_seen(self) -> None:
        """ConfigError: a name that no row has."""
        if self._unseen and self._fields:
            raise ConfigError(
                f"data.sources: {self.source.path}: columns names {', '.join(sorted(self._unseen))}, which no row has; "
                f"the first row has {', '.join(f'{name!s:.40}' for name in list(self._fields)[:20])}"
            )


def _taken(source: SourceSection) -> Iterator[tuple[int, int, tuple[str, Any]]]:
    """(row number, copy, row) of what `weight` takes: every row as often as its whole part says, and some once more.

    Which those are follows from seed and row number alone, so a source that grows keeps them.
    """
    copies, fraction = divmod(source.weight, 1)
    for number, row in enumerate(read_rows(source)):
        draw = hashlib.blake2b(f"{source.seed}\0{number}".encode(), digest_size=8).digest() if fraction else b""
        extra = bool(fraction) and int.from_bytes(draw, "big") < fraction * 2**64
        for copy in range(int(copies) + extra):
            yield number, copy, row


class _Reading:
    """Rows become samples or errors; ids are looked at once."""

    def __init__(self, files: ImageFiles, *, only_questions: bool, watched: Container[str] = ()) -> None:
        self.files = files
        self._only_questions = only_questions
        self._watched = watched
        self.rows: dict[str, Row] = {}  # by watched id or place
        self.errors: list[SampleError] = []
        self.first_place: dict[str, str] = {}  # by sample id

    def take(
        self, row: Any, *, place: str, given: str | None, copy: int, columns: _Columns, images: Path | Archive
    ) -> list[Sample]:
        """The samples of a row; none of one that is an error. `given`: its id, or None: the row's own."""
        names = [place]
        try:
            if isinstance(row, Broken):
                raise SampleRefusedError(row.reason)
            if not isinstance(row, dict):
                raise SampleRefusedError(f"row is {type(row).__name__}, expected an object")
            fields = columns.rename(row)
            name = (given or _id(fields)) + (f"~{copy + 1}" if copy else "")
            of_row = [name + CHOSEN, name + REJECTED] if is_pair(fields) else [name]
            for name in of_row:
                self._refuse_known(name)
            names = of_row
            self.first_place.update(dict.fromkeys(names, place))
            samples = self._parsed(names, fields, columns.source, images)
        except SampleRefusedError as refusal:
            reason = str(refusal) if len(str(refusal)) <= _MAX_REASON else f"{str(refusal)[:_MAX_REASON]}…"
            self.errors += [SampleError(name, f"{place}: {reason}") for name in names]
            return []
        for name in names:
            if name in self._watched:
                self.rows[name] = Row(place, [name])
            elif place in self._watched:
                self.rows.setdefault(place, Row(place, [])).sample_ids.append(name)
        return samples

    def _parsed(
        self, names: Sequence[str], fields: dict[str, Any], source: SourceSection, images: Path | Archive
    ) -> list[Sample]:
        ignored = frozenset(source.ignore)
        conversation = parse_conversation(fields, only_questions=self._only_questions, ignored=ignored)
        category = _category(fields)
        paths = tuple(self.files.file(value, images) for value in conversation.images)
        turns = conversation.turns
        samples = [Sample(names[0], source.split, category, paths, turns)]
        if conversation.rejected is not None:
            samples.append(Sample(names[1], source.split, category, paths, (*turns[:-1], conversation.rejected)))
        return samples

    def _refuse_known(self, name: str) -> None:
        if name in self.first_place:
            raise SampleRefusedError(
                f"duplicate id {shorten(name)}, first seen at {self.first_place[name]}; that one is kept "
                "(`ids: position` numbers the rows of a source instead)"
            )


def _named_once(errors: Sequence[SampleError], taken: Container[str]) -> tuple[SampleError, ...]:
    """The errors, a place marked where it is a sample's id or another error's, so that no two are the same."""
    named: list[SampleError] = []
    seen: dict[str, int] = {}
    for error in errors:
        name = error.sample_id
        if name in taken and error.reason.startswith(f"{name}: "):
            name = f"row {name}"
        seen[name] = seen.get(name, 0) + 1
        named.append(error if name == error.sample_id else replace(error, sample_id=name))
        if seen[name] > 1:
            named[-1] = replace(named[-1], sample_id=f"{name} (error {seen[name]})")
    return tuple(named)


def _id(fields: dict[str, Any]) -> str:
    value = fields.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise SampleRefusedError(
            f"id is {shorten(value)}, expected text or a number (`ids: position` numbers the rows)"
        )
    text = encodable(str(value), "id")
    if len(text) > _MAX_ID:
        raise SampleRefusedError(f"id is {shorten(text)}, expected at most {_MAX_ID:,} characters")
    return text


def _category(fields: dict[str, Any]) -> str:
    value = fields.get("category")
    if not isinstance(value, str | None):
        raise SampleRefusedError(f"category is {shorten(value)}, expected text")
    return encodable(value or "", "category")


def _image_place(source: SourceSection) -> Path | Archive:
    folder = _image_folder(source)
    return open_archive(folder) if source.images is not None and folder.is_file() else folder


def _image_folder(source: SourceSection) -> Path:
    return Path(source.images if source.images is not None else Path(source.path).parent).resolve()


def _common_folder(folders: Sequence[Path]) -> Path:
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError as error:  # two drives
        raise ConfigError(f"data.sources: image folders share no folder: {error}") from error
    if len(folders) > 1 and common == Path(common.anchor):
        shown = ", ".join(sorted(map(str, folders)))
        raise ConfigError(
            f"data.sources: image folders share no folder below {common}: {shown}; "
            "data.extracted is where images from bytes and archives go"
        )
    for folder in folders:
        if folder != common:
            try:
                check_image_path(folder.relative_to(common).as_posix())
            except ValueError as error:
                raise ConfigError(f"data.sources: {error}") from error
    return common
