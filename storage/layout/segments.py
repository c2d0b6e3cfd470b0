"""Segments, one per dump into a cache, and the choice of the segment that a dump resumes or creates.

Segment 0 is described by cache.json. A later segment (segments/0001.json, …) either adds families to the
parts of a complete segment, or appends parts with the next numbers: of new samples, or of samples that
failed before (retries.py). A segment never changes what an earlier dump wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from storage.backends.folder import Folder
from storage.encoding.parquet_schema import FAMILIES
from storage.errors import CacheError, CorruptPartError, IdentityError, NoCacheError
from storage.identity import FORMAT_VERSION, NO_TEACHER, Identity, describe_differences, stored_relation
from storage.images.image_root import is_moved_root
from storage.layout.documents import CacheDescription, Document, NamedFile, SegmentDescription, parse_document

CACHE_FILE = "cache.json"
SEGMENTS_FOLDER = "segments"
COMMITS_FOLDER = "commits"
MAX_SEGMENTS = 9999

_SEGMENT_NAME = re.compile(rf"{SEGMENTS_FOLDER}/(\d{{4}})\.json")
_COMMIT_NAME = re.compile(r"/part-\d{5,8}\.json$")
# Fields that describe the teacher; not compared with a segment of tokens only, which has none.
_OF_THE_TEACHER = ("teacher", "teacher_fingerprint", "dtype")
# Fields that may differ between segments. `engine`: a later dump may use another version; a segment has one.
_OF_A_SEGMENT = ("format_version", "engine")
_OF_A_PLAN = ("plan_fingerprint", "num_parts")
_OF_TOKENS = ("tokenisation", "chat_template_arguments")  # of `selection.tokens`; equal in all segments


@dataclass(frozen=True)
class Segment:
    """The part of a cache that one dump writes: a set of families over a range of parts."""

    number: int
    families: tuple[str, ...]  # besides tokens
    identity: Identity
    format_version: int
    adds_to: int | None  # the segment whose parts get these families; None: parts, and tokens, of its own
    first_part: int
    sha256: str  # of its document's bytes
    retries: int | None = None  # the segment whose failed samples this one dumps again
    failed_ids: tuple[tuple[str, ...], ...] = ()  # of these samples, by part
    processor_files: tuple[NamedFile, ...] = ()  # that segment 0 names

    @property
    def has_tokens(self) -> bool:
        """True if the segment has parts of its own; False if it adds families to another segment's."""
        return self.adds_to is None

    @property
    def stored_families(self) -> tuple[str, ...]:
        """All families that the segment stores, including tokens if it has them."""
        return ("tokens", *self.families) if self.has_tokens else self.families

    @property
    def num_parts(self) -> int:
        """The number of parts of the segment's plan."""
        return self.identity.num_parts

    @property
    def parts(self) -> range:
        """The numbers of its parts within the cache."""
        return range(self.first_part, self.first_part + self.num_parts)

    @property
    def file(self) -> str:
        """The path of its document, relative to the cache."""
        return segment_file(self.number)

    @property
    def commits_folder(self) -> str:
        """The path of the folder of its commits, relative to the cache."""
        return COMMITS_FOLDER if self.number == 0 else f"{COMMITS_FOLDER}/{self.number:04d}"

    @property
    def manifest_file(self) -> str:
        """The path of its manifest, relative to the cache."""
        return "manifest.json" if self.number == 0 else f"manifest-{self.number:04d}.json"


@dataclass(frozen=True)
class NewSegment:
    """A segment to create, with the document that creates it."""

    number: int
    families: tuple[str, ...]
    adds_to: int | None
    document: Document

    @property
    def file(self) -> str:
        return segment_file(self.number)


def segment_file(number: int) -> str:
    """Returns the path of a segment's document, relative to the cache."""
    return CACHE_FILE if number == 0 else f"{SEGMENTS_FOLDER}/{number:04d}.json"


def read_segments(folder: Folder) -> list[Segment]:
    """Reads all segments, by number. Errors: NoCacheError if there is no cache, CorruptPartError."""
    segments = [_read_first_segment(folder)]
    matches = [_SEGMENT_NAME.fullmatch(name) for name in folder.list_files(SEGMENTS_FOLDER)]
    for number in sorted(int(match[1]) for match in matches if match):
        if number != len(segments):
            missing = folder.locate(segment_file(len(segments)))
            raise CorruptPartError(f"{missing}: is missing, but segment {number} is there; put it back")
        segments.append(_read_later_segment(folder, number, segments))
    return segments


def has_cache(folder: Folder) -> bool:
    """True if the folder has a cache.json."""
    return CACHE_FILE in folder.list_files()


def is_complete(folder: Folder, segment: Segment) -> bool:
    """True if a segment has a manifest and as many commits as parts; reads file names only."""
    return segment.manifest_file in folder.list_files() and is_committed(folder, segment)


def is_committed(folder: Folder, segment: Segment) -> bool:
    """True if a segment, sealed or not, has as many commits as parts; reads file names only."""
    names = folder.list_files(segment.commits_folder)
    return sum(_COMMIT_NAME.search(name) is not None for name in names) >= segment.num_parts


def select_additions(segments: Sequence[Segment], base: Segment) -> list[Segment]:
    """Returns the segments that add families to the parts of `base`."""
    return [segment for segment in segments if segment.adds_to == base.number]


def merge_identities(segments: Sequence[Segment]) -> Identity:
    """Returns segment 0's identity with the selections of all families and the first recorded teacher."""
    first = next((one.identity for one in segments if _has_teacher(one.identity)), segments[0].identity)
    selection = {**segments[0].identity.selection}
    for segment in segments[1:]:
        for family in segment.families:
            if family in segment.identity.selection:
                selection.setdefault(family, segment.identity.selection[family])
    teacher = {name: getattr(first, name) for name in (*_OF_THE_TEACHER, "engine")}
    return segments[0].identity.model_copy(update={"selection": selection, **teacher})


def find_segment(
    folder: Folder, identity: Identity, families: Sequence[str], *, append: bool
) -> tuple[Segment | NewSegment, list[Segment]]:
    """Returns the segment that a dump must resume or create, and all existing segments.

    The first of these that applies: an incomplete segment of this plan; a new segment with the families
    that this plan's samples lack; with `append`, a new segment for a plan that the cache lacks; the
    complete segment of this plan, which needs no more work. Errors: IdentityError naming each field that
    differs; CacheError for an unknown family.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise CacheError(f"{folder}: unknown families {unknown}, expected some of {FAMILIES}")
    wanted = tuple(family for family in FAMILIES if family in families and family != "tokens")
    if not has_cache(folder):
        return NewSegment(0, wanted, None, _make_first_document(wanted, identity)), []
    segments = read_segments(folder)
    base = next((one for one in segments if one.has_tokens and _has_same_plan(one.identity, identity)), None)
    plan_of = base or (None if append else segments[0])
    lines = describe_disagreements(segments, identity, wanted, plan_of=plan_of)
    if base is None and append:
        lines += _describe_other_image_root(folder, segments, identity)
    if lines:
        hint = "" if append or base is not None else " (cache.append: true adds the samples of another plan)"
        raise make_refusal(folder, lines, hint)
    if base is None:
        return _make_later_segment(segments, wanted, identity, adds_to=None), segments
    found = _find_unfinished(folder, segments, base, wanted, identity)
    if found is None:
        held = {family for one in (base, *select_additions(segments, base)) for family in one.families}
        lacking = tuple(family for family in wanted if family not in held)
        found = _make_later_segment(segments, lacking, identity, adds_to=base) if lacking else base
    return found, segments


def describe_disagreements(
    segments: Sequence[Segment], identity: Identity, families: Sequence[str], *, plan_of: Segment | None
) -> list[str]:
    """Returns one line per field in which a dump of `families` with this identity contradicts the cache.

    The plan is compared with that of `plan_of`, if given. The selection of a family must be the same in
    the whole cache, and so must the teacher, if both have one.
    """
    cache = merge_identities(segments)
    same = [*_OF_A_SEGMENT]
    if not (_has_teacher(cache) and _has_teacher(identity)):
        same += _OF_THE_TEACHER
    held = {family for one in segments for family in one.families}
    both = [family for family in families if family in held]
    theirs = {"selection": {family: _select_compared_settings(cache, family) for family in ("tokens", *both)}}
    ours = {"selection": {family: _select_compared_settings(identity, family) for family in ("tokens", *both)}}
    plan = {name: getattr(identity if plan_of is None else plan_of.identity, name) for name in _OF_A_PLAN}
    return describe_differences(
        cache.model_copy(update={**theirs, **plan}),
        identity.model_copy(update={**ours, **{name: getattr(cache, name) for name in same}}),
    )


def _select_compared_settings(identity: Identity, family: str) -> dict[str, Any] | None:
    """Returns the settings of a family that must agree; for relation matrices with all defaults.

    For tokens these are only the settings that turn a conversation into ids: the way a teacher answered
    may differ between segments.
    """
    if family == "tokens":
        return {name: identity.selection.get("tokens", {}).get(name) for name in _OF_TOKENS}
    if family == "relation":
        return stored_relation(identity).model_dump(mode="json", exclude_none=True)
    return identity.selection.get(family)


def _find_unfinished(
    folder: Folder, segments: Sequence[Segment], base: Segment, wanted: Sequence[str], identity: Identity
) -> Segment | None:
    """Returns the first incomplete segment of this plan that has requested families, or None."""
    for segment in (base, *select_additions(segments, base)):
        if not (segment.has_tokens or set(segment.families) & set(wanted)) or is_complete(folder, segment):
            continue
        lines = []
        if not set(segment.families) <= set(wanted):
            lines.append(f"families: cache has {segment.families}, this run has {tuple(wanted)}")
        if segment.identity.engine != identity.engine and segment.families:
            lines.append(f"engine: cache has {segment.identity.engine!r}, this run has {identity.engine!r}")
        if lines:
            raise make_refusal(folder, lines, f" (segment {segment.number} is not finished)")
        return segment
    return None


def _make_later_segment(
    segments: Sequence[Segment], families: tuple[str, ...], identity: Identity, *, adds_to: Segment | None
) -> NewSegment:
    if len(segments) > MAX_SEGMENTS:
        raise CacheError(f"a cache has at most {MAX_SEGMENTS} segments after the first")
    end = max(segment.parts.stop for segment in segments)
    selection = {name: identity.selection[name] for name in ("tokens", *families) if name in identity.selection}
    document = SegmentDescription(
        format_version=FORMAT_VERSION,
        cache_sha256=segments[0].sha256,
        segment=len(segments),
        adds_to=None if adds_to is None else adds_to.number,
        first_part=end if adds_to is None else adds_to.first_part,
        families=families,
        identity=identity.model_copy(update={"selection": selection}),
    )
    return NewSegment(len(segments), families, document.adds_to, document)


def _make_first_document(families: tuple[str, ...], identity: Identity) -> CacheDescription:
    return CacheDescription(format_version=FORMAT_VERSION, families=families, identity=identity)


def make_refusal(folder: Folder, lines: Sequence[str], hint: str) -> IdentityError:
    """Makes the error for a dump whose identity differs from the cache's; `lines` are the differences."""
    return IdentityError(
        f"{folder}: the cache there was made with other settings{hint}; undo the change, or set cache.path to "
        "another folder, which leaves this one unchanged:" + "".join(f"\n  {line}" for line in lines)
    )


def _read_first_segment(folder: Folder) -> Segment:
    place = folder.locate(CACHE_FILE)
    try:
        content = folder.read(CACHE_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoCacheError(f"{folder}: no cache is here ({CACHE_FILE} is missing); run the dump") from error
    description = parse_document(content, CacheDescription, place)
    _check_families(place, description.families)
    sha256 = hashlib.sha256(content).hexdigest()
    return Segment(
        number=0,
        families=description.families,
        identity=description.identity,
        format_version=description.format_version,
        adds_to=None,
        first_part=0,
        sha256=sha256,
        processor_files=description.processor_files or (),
    )


def _read_later_segment(folder: Folder, number: int, earlier: Sequence[Segment]) -> Segment:
    place = folder.locate(segment_file(number))
    content = folder.read(segment_file(number))
    document = parse_document(content, SegmentDescription, place)
    if document.segment != number or document.cache_sha256 != earlier[0].sha256:
        raise CorruptPartError(f"{place}: is segment {document.segment} or of another cache, expected segment {number}")
    _check_families(place, document.families)
    segment = Segment(
        number, document.families, document.identity, document.format_version, document.adds_to, document.first_part,
        hashlib.sha256(content).hexdigest(), document.retries, document.failed_ids or (),
    )  # fmt: skip
    if document.retries is not None or document.failed_ids is not None:
        _check_retry(earlier, segment, place)
    base = _find_base(earlier, segment, place)
    lines = describe_disagreements(earlier, segment.identity, segment.families, plan_of=base)
    if lines:
        raise CorruptPartError(f"{place}: contradicts the segments before it:" + "".join(f"\n  {one}" for one in lines))
    return segment


def _find_base(earlier: Sequence[Segment], segment: Segment, place: str) -> Segment | None:
    """Returns the segment that this one adds families to, or None. CorruptPartError for invalid parts."""
    if segment.adds_to is None:
        end = max(one.parts.stop for one in earlier)
        if segment.first_part != end:
            raise CorruptPartError(f"{place}: begins at part {segment.first_part}, the segments before it end at {end}")
        return None
    base = next((one for one in earlier if one.number == segment.adds_to and one.has_tokens), None)
    if base is None or segment.parts != base.parts:
        raise CorruptPartError(f"{place}: adds to segment {segment.adds_to}, which has no such parts")
    held = {family for one in (base, *select_additions(earlier, base)) for family in one.families}
    twice = sorted(held & set(segment.families))
    if twice or not segment.families:
        raise CorruptPartError(f"{place}: adds {', '.join(twice) or 'nothing'}, which parts {segment.parts} have")
    return base


def _check_retry(earlier: Sequence[Segment], segment: Segment, place: str) -> None:
    """Raises CorruptPartError for a retry that contradicts itself or whose base segment is missing."""
    base = next((one for one in earlier if one.number == segment.retries), None)
    ids = [sample_id for of_part in segment.failed_ids for sample_id in of_part]
    if not segment.has_tokens:
        raise CorruptPartError(f"{place}: retries failed samples, but also adds families to another segment")
    if base is None or not base.has_tokens or base.retries is not None:
        raise CorruptPartError(f"{place}: retries failed samples of segment {segment.retries}, which has none")
    if len(segment.failed_ids) != segment.num_parts or len(set(ids)) < len(ids) or not all(segment.failed_ids):
        raise CorruptPartError(
            f"{place}: must list failed samples for each of its {segment.num_parts} parts, each sample once"
        )


def _describe_other_image_root(folder: Folder, segments: Sequence[Segment], identity: Identity) -> list[str]:
    """Returns a line if new images lie outside the cache's image root; a reader uses one root for all."""
    known = [segment.identity.image_root for segment in select_tokens_segments(segments)]
    new = identity.image_root
    if new in known or any(is_moved_root(old, new, folder.locate("")) for old in known):
        return []
    return [f"image_root: cache has {known[0]!r}, this run has {new!r}; use a folder that contains both"]


def _check_families(place: str, families: Sequence[str]) -> None:
    unknown = [family for family in families if family not in FAMILIES or family == "tokens"]
    if unknown or len(set(families)) != len(families):
        raise CorruptPartError(f"{place}: families are {families}, expected some of {FAMILIES[1:]}")


def _has_same_plan(one: Identity, other: Identity) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _OF_A_PLAN)


def _has_teacher(identity: Identity) -> bool:
    return identity.teacher_fingerprint != NO_TEACHER


def select_tokens_segments(segments: Collection[Segment]) -> list[Segment]:
    """Returns the segments that have parts of their own, in the order of the parts."""
    return [segment for segment in segments if segment.has_tokens]
