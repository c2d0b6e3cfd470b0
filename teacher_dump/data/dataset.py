"""Reads the sources' rows as samples; every row becomes samples or a recorded error."""

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
from storage.records.records import SampleError, check_image_path
from storage.records.sample_key import HALVES, SampleKey
from teacher_dump.config import SourceSection
from teacher_dump.data.archives import Archive, open_archive
from teacher_dump.data.conversation import (
    QUESTION_KEY,
    Conversation,
    check_encodable,
    is_pair,
    parse_conversation,
)
from teacher_dump.data.image_store import ImageFiles
from teacher_dump.data.sample import Sample, SampleRefusedError, Turn, shorten
from teacher_dump.data.sample_spool import SampleFile
from teacher_dump.data.sources.formats import read_rows
from teacher_dump.data.sources.row import BrokenRow

_MAX_ID = 1000  # characters
_MAX_REASON = 1000  # characters; messages of libraries may be long


@dataclass(frozen=True)
class SampleSet:
    """The usable samples of the sources in order, and an error for every other row."""

    samples: Sequence[Sample]  # on disk, read on access
    errors: tuple[SampleError, ...]
    image_root: Path  # absolute; the folder that all images lie in
    rows: Mapping[str, WatchedRow] = field(default_factory=dict)  # of the names in `watched`, those of usable samples


@dataclass
class WatchedRow:
    """A watched row that became samples."""

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
    """Reads all samples of all sources.

    A broken row, a duplicate id, a missing image or a path outside its image folder costs only that sample.
    It becomes a SampleError under its id or, if the id is unknown or taken, under its place in the file;
    a preference pair becomes two errors, under both of its ids. `extracted` is the folder for images that are
    bytes or lie in archives; `only_questions` drops all answers; `spool` is the folder of the samples' file.
    `watched`: ids or places of rows to report in `rows`.
    Raises ConfigError for no sources, or a source that is missing or cannot be read at all.
    """
    if not sources:
        raise ConfigError("data.sources: is empty; name at least one file of conversations, such as a LLaVA JSON")
    reader = _SampleReader(ImageFiles(extracted.resolve()), only_questions=only_questions, watched=watched)
    samples = SampleFile(_iterate_samples(sources, reader), folder=spool)
    root = _find_common_folder(list(reader.files.folders) or [_resolve_image_folder(sources[0])])
    samples.strip_path_prefix(len(str(root).rstrip("/")) + 1)
    return SampleSet(samples, _make_names_unique(reader.errors, reader.first_place), root, reader.rows)


def _iterate_samples(sources: Sequence[SourceSection], reader: _SampleReader) -> Iterator[Sample]:
    for position, (source, name) in enumerate(zip(sources, _make_position_names(sources), strict=True)):
        images = _open_image_source(source)
        number = None
        columns = _ColumnNames(source)
        for number, copy, (place, row) in islice(_iterate_weighted_rows(source), source.limit):
            key = SampleKey(f"{name}:{number}" if source.ids == "position" else "", copy=copy, source=position)
            yield from reader.read_row(row, place=place, key=key, columns=columns, images=images)
        if number is None and (num_rows := sum(1 for _ in read_rows(source))):
            raise ConfigError(
                f"data.sources: {source.path}: weight {source.weight:g} selects none of its {num_rows:,} rows; "
                "give a larger weight, or another seed"
            )
        if source.limit is None and source.weight >= 1:  # every row was seen
            columns.check_all_seen()


def _make_position_names(sources: Sequence[SourceSection]) -> list[str]:
    """Returns each source's name under `ids: position`: its file's name, with @2 and so on if it repeats."""
    counts: Counter[str] = Counter()
    names = []
    for source in sources:
        stem = Path(source.path).stem
        counts[stem] += source.ids == "position"
        names.append(stem if counts[stem] < 2 else f"{stem}@{counts[stem]}")
    return names


class _ColumnNames:
    """Maps a source's field names to ours."""

    def __init__(self, source: SourceSection) -> None:
        self.source = source
        self._unseen = set(source.columns.values())
        self._fields: dict[str, None] = {}  # of the first row

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row under our names, without the source's own."""
        if not self.source.columns:
            return dict(row)
        self._unseen.difference_update(row)
        self._fields = self._fields or dict.fromkeys(row)
        kept = {name: value for name, value in row.items() if name not in self.source.columns.values()}
        return {**kept, **{ours: row.get(theirs) for ours, theirs in self.source.columns.items()}}

    def check_all_seen(self) -> None:
        """Raises ConfigError if `columns` names a field that no row has."""
        if self._unseen and self._fields:
            raise ConfigError(
                f"data.sources: {self.source.path}: columns names {', '.join(sorted(self._unseen))}, which no row has; "
                f"the first row has {', '.join(f'{name!s:.40}' for name in list(self._fields)[:20])}"
            )


def _iterate_weighted_rows(source: SourceSection) -> Iterator[tuple[int, int, tuple[str, Any]]]:
    """Yields (row number, copy, row): each row floor(weight) times, and a random fraction once more.

    The random choice depends only on seed and row number, so a source that grows keeps its earlier rows.
    """
    copies, fraction = divmod(source.weight, 1)
    for number, row in enumerate(read_rows(source)):
        draw = hashlib.blake2b(f"{source.seed}\0{number}".encode(), digest_size=8).digest() if fraction else b""
        extra = bool(fraction) and int.from_bytes(draw, "big") < fraction * 2**64
        for copy in range(int(copies) + extra):
            yield number, copy, row


class _SampleReader:
    """Turns rows into samples or errors, and checks that ids are unique."""

    def __init__(self, files: ImageFiles, *, only_questions: bool, watched: Container[str] = ()) -> None:
        self.files = files
        self._only_questions = only_questions
        self._watched = watched
        self.rows: dict[str, WatchedRow] = {}  # by watched id or place
        self.errors: list[SampleError] = []
        self.first_place: dict[str, str] = {}  # by sample id

    def read_row(
        self, row: Any, *, place: str, key: SampleKey, columns: _ColumnNames, images: Path | Archive
    ) -> list[Sample]:
        """Returns the samples of a row; none if it is an error. `key`: with an empty id for the row's own."""
        keys: list[SampleKey] = []
        try:
            if isinstance(row, BrokenRow):
                raise SampleRefusedError(row.reason)
            if not isinstance(row, dict):
                raise SampleRefusedError(f"row is {type(row).__name__}, expected an object")
            fields = columns.rename(row)
            key = _read_key(fields, key)
            of_row = [replace(key, half=half) for half in HALVES] if is_pair(fields) else [key]
            for key in of_row:
                self._check_unique(key.sample_id)
            keys = of_row
            self.first_place.update((key.sample_id, place) for key in keys)
            samples = self._make_samples(keys, fields, columns.source, images)
        except SampleRefusedError as refusal:
            reason = str(refusal) if len(str(refusal)) <= _MAX_REASON else f"{str(refusal)[:_MAX_REASON]}…"
            reason = f"{place}: {reason}"
            self.errors += [SampleError(key.sample_id, reason, key) for key in keys] or [SampleError(place, reason)]
            return []
        for name in (sample.id for sample in samples):
            if name in self._watched:
                self.rows[name] = WatchedRow(place, [name])
            elif place in self._watched:
                self.rows.setdefault(place, WatchedRow(place, [])).sample_ids.append(name)
        return samples

    def _make_samples(
        self, keys: Sequence[SampleKey], fields: dict[str, Any], source: SourceSection, images: Path | Archive
    ) -> list[Sample]:
        ignored = frozenset(source.ignore)
        conversation = parse_conversation(fields, only_questions=self._only_questions, ignored=ignored)
        category = _read_category(fields)
        paths = tuple(self.files.resolve(value, images) for value in conversation.images)
        turns = conversation.turns if source.template == "chat" else _take_caption(conversation)
        samples = [Sample(keys[0], source.split, category, paths, turns)]
        if conversation.rejected is not None:
            samples.append(Sample(keys[1], source.split, category, paths, (*turns[:-1], conversation.rejected)))
        return samples

    def _check_unique(self, name: str) -> None:
        if name in self.first_place:
            raise SampleRefusedError(
                f"duplicate id {shorten(name)}, first seen at {self.first_place[name]}; that one is kept "
                "(`ids: position` numbers the rows of a source instead)"
            )


def _take_caption(conversation: Conversation) -> tuple[Turn, ...]:
    """Returns a caption's only turn. Raises SampleRefusedError for a row that is not a question and its answer."""
    roles = [turn.role for turn in conversation.turns]
    if roles != ["user", "assistant"] or conversation.rejected is not None or len(conversation.images) != 1:
        raise SampleRefusedError(
            f"has {len(conversation.images)} images and the turns {', '.join(roles)}, but its source has template: "
            "caption, expected one image, one question, which is left out, and its answer"
        )
    return conversation.turns[1:]


def _make_names_unique(errors: Sequence[SampleError], taken: Container[str]) -> tuple[SampleError, ...]:
    """Returns the errors with unique ids; renames those that collide with a sample or another error."""
    named: list[SampleError] = []
    seen: dict[str, int] = {}
    for error in errors:
        name = error.sample_id
        if name in taken and error.key is None:
            name = f"row {name}"
        seen[name] = seen.get(name, 0) + 1
        named.append(error if name == error.sample_id else replace(error, sample_id=name))
        if seen[name] > 1:
            named[-1] = replace(named[-1], sample_id=f"{name} (error {seen[name]})")
    return tuple(named)


def _read_key(fields: dict[str, Any], key: SampleKey) -> SampleKey:
    """Returns the key of a row: of one that the teacher answered its question's, else `key`, with the row's own id."""
    given = fields.get(QUESTION_KEY)
    if given is None:
        return replace(key, row_id=key.row_id or _read_id(fields))
    try:
        row_id, _, copy, source = given
        return SampleKey(_read_id({"id": row_id}), copy=copy, source=source)
    except (TypeError, ValueError) as error:
        raise SampleRefusedError(f"{QUESTION_KEY} is {shorten(given)}, expected a key: {error}") from error


def _read_id(fields: dict[str, Any]) -> str:
    value = fields.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise SampleRefusedError(
            f"id is {shorten(value)}, expected text or a number (`ids: position` numbers the rows)"
        )
    text = check_encodable(str(value), "id")
    if len(text) > _MAX_ID:
        raise SampleRefusedError(f"id is {shorten(text)}, expected at most {_MAX_ID:,} characters")
    return text


def _read_category(fields: dict[str, Any]) -> str:
    value = fields.get("category")
    if not isinstance(value, str | None):
        raise SampleRefusedError(f"category is {shorten(value)}, expected text")
    return check_encodable(value or "", "category")


def _open_image_source(source: SourceSection) -> Path | Archive:
    folder = _resolve_image_folder(source)
    return open_archive(folder) if source.images is not None and folder.is_file() else folder


def _resolve_image_folder(source: SourceSection) -> Path:
    return Path(source.images if source.images is not None else Path(source.path).parent).resolve()


def _find_common_folder(folders: Sequence[Path]) -> Path:
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
