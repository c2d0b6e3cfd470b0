"""The JSON files of a cache: cache.json, later segments, a part's commit, a segment's manifest.

Each document contains its own sha256. It is written as canonical JSON (sorted keys, indent 1, ASCII, a
final newline), so a reader can require the exact bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import CacheError, CorruptPartError
from storage.identity import FORMAT_VERSION, Identity

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**62)]
LARGEST_ERROR = 1e6  # a bound, so that sums over parts are finite
ErrorValue = Annotated[float, Field(ge=0, le=LARGEST_ERROR, allow_inf_nan=False)]


class Entry(BaseModel):
    """A frozen part of a document; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(Entry):
    """A whole JSON file."""

    def to_bytes(self) -> bytes:
        """Returns the file's content, including its own sha256."""
        body = self._to_dict()
        canonical = _to_canonical_json(body)
        return _insert_hash(canonical, body, hashlib.sha256(canonical).hexdigest())

    def canonical_json(self) -> bytes:
        """Returns the content without the sha256 field: the bytes that the sha256 is computed over."""
        return _to_canonical_json(self._to_dict())

    def _to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}


class FileEntry(Entry):
    """One Parquet file of a part."""

    file: str  # relative to the cache, forward slashes
    rows: Count  # Parquet rows: samples, or image keys
    file_bytes: Count
    sha256: Sha256


class ErrorEntry(Entry):
    """A sample of the plan that has no record."""

    sample_id: str
    reason: str


class HeadEntry(Entry):
    """The output head's file, one per cache; every commit with hidden states names it."""

    file: str  # relative to the cache
    file_bytes: Count
    sha256: Sha256


class NamedFile(Entry):
    """A further file in the cache: of the tokenizer or processor, or an index."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]  # original name
    file: str  # relative to the cache
    file_bytes: Count
    sha256: Sha256


class ErrorSummary(Entry):
    """Statistics of one kind of error in a family, over the rows or matrices that were measured."""

    measure: str  # see error_summaries.MEASURES
    count: Annotated[int, Field(ge=1, le=2**62)]
    mean: ErrorValue
    p99: ErrorValue  # in the manifest: the largest of the parts' p99
    max: ErrorValue


class ErrorSummaries(Document):
    """Error summaries by family, of a commit's files or of a whole segment; None if not measured."""

    teacher_noise: dict[str, ErrorSummary] | None = None  # of some samples that were scored twice
    selection_errors: dict[str, ErrorSummary] | None = None  # selected entries against the dense row
    dropped_mass: dict[str, ErrorSummary] | None = None  # of selections that draw nothing from the tail
    errors_by_family: dict[str, ErrorSummary] | None = None  # of lossy encodings


class EngineCheckEntry(Entry):
    """What a dump knew of the distance between its engine and the model itself, from a slice of samples.

    Without figures, all fields but `state` are empty.
    """

    state: Literal["passed", "off"]  # off: dump.engine_check is false
    engine: str = ""  # name and version
    model: str = ""  # that of transformers
    dtype: str = ""
    num_samples: Count = 0
    max_kl: ErrorValue = 0.0  # nats a row: the limit of the mean
    families: dict[str, tuple[ErrorSummary, ...]] = {}  # one for each measure


class CacheDescription(Document):
    """cache.json: the families and the identity of the first segment."""

    format_version: int
    families: tuple[str, ...]  # besides tokens
    identity: Identity
    processor_files: tuple[NamedFile, ...] | None = None  # of the teacher's tokenizer and processor; None before


class SegmentDescription(Document):
    """segments/0001.json: adds families to a segment's parts, or parts of new or of failed samples."""

    format_version: int
    cache_sha256: Sha256  # of the bytes of cache.json
    segment: Annotated[int, Field(ge=1, le=9999)]
    adds_to: Count | None = None  # the segment whose parts get these families; None: new parts, with their own tokens
    first_part: Count
    families: tuple[str, ...]  # besides tokens
    identity: Identity
    retries: Count | None = None  # the segment whose failed samples the parts hold
    failed_ids: tuple[tuple[str, ...], ...] | None = None  # of those samples, by part


class Commit(ErrorSummaries):
    """commits/part-00000.json: exists only if the part's files are complete."""

    format_version: int
    cache_sha256: Sha256  # of the bytes of the segment's document: cache.json, segments/0001.json
    part: Count
    num_samples: Count
    num_images: Count  # image keys, each once
    num_rows: dict[str, Count]  # distribution rows, of the families response and visual
    families: dict[str, FileEntry]
    errors: tuple[ErrorEntry, ...]
    head: HeadEntry | None = None  # where there are hidden states


class CommitEntry(Entry):
    """One commit in the manifest."""

    file: str
    sha256: Sha256  # of the commit file's bytes


class Manifest(ErrorSummaries):
    """manifest.json, manifest-0001.json: seals a segment; determined by its document, commits and engine check."""

    format_version: int
    cache_sha256: Sha256  # as a commit's
    num_samples: Count
    num_errors: Count
    num_rows: dict[str, Count]
    bytes_by_family: dict[str, Count]  # and those of the head
    commits: tuple[CommitEntry, ...]  # by part
    head: HeadEntry | None = None
    engine_check: EngineCheckEntry | None = None  # of a dump that had one, or did without
    index: NamedFile | None = None  # where samples lie, so that a reader need not read every part's ids


Kind = TypeVar("Kind", bound=Document)


def parse_document(content: bytes, kind: type[Kind], place: str) -> Kind:
    """Parses and checks a document's bytes: checksum, format version, then content.

    Errors: CacheError for another format version, CorruptPartError for any other problem.
    """
    try:
        body = json.loads(content.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise CorruptPartError(f"{place}: is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise CorruptPartError(f"{place}: is not a JSON object")
    version = body.get("format_version")
    claimed = body.pop("sha256", None)
    canonical = _to_canonical_json(body)
    actual = hashlib.sha256(canonical).hexdigest()
    if claimed != actual:
        raise CorruptPartError(f"{place}: its content has the sha256 {actual}, but it states {claimed}")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{place}: format version is {version!r}, this Stillhouse reads {FORMAT_VERSION}; "
            "read it with the version that wrote it, or dump again"
        )
    try:
        document = kind.model_validate_json(canonical)
    except (ValidationError, ValueError) as error:
        raise CorruptPartError(f"{place}: {error}") from error
    if document.canonical_json() != canonical or _insert_hash(canonical, body, actual) != content:
        raise CorruptPartError(f"{place}: is not the canonical JSON that FORMAT.md requires; its bytes were changed")
    return document


def _to_canonical_json(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _insert_hash(canonical: bytes, body: Iterable[str], sha256: str) -> bytes:
    """Returns the canonical JSON with a sha256 field, by inserting its line: half the time of dumping again."""
    line = f' "sha256": "{sha256}"'.encode("ascii")
    following = min((name for name in body if name > "sha256"), default=None)
    if following is None:
        return canonical.removesuffix(b"\n}\n") + b",\n" + line + b"\n}\n"
    position = canonical.index(f"\n {json.dumps(following)}:".encode("ascii")) + 1
    return canonical[:position] + line + b",\n" + canonical[position:]
