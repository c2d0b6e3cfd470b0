"""The layout of a cache's files, and the commits of parts: each written exclusively, after its files.

<family>/part-00000.<12 hex of its sha256>.parquet, commits/part-00000.json and manifest.json for segment 0,
commits/0001/part-00000.json and manifest-0001.json for later ones (segments.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from storage.backends import folder as files
from storage.backends.folder import Folder
from storage.encoding.output_head import StoredHead, decode_head
from storage.errors import CacheError, CorruptPartError
from storage.layout.documents import (
    Commit,
    CommitEntry,
    EngineCheckEntry,
    FileEntry,
    HeadEntry,
    Manifest,
    parse_document,
)
from storage.layout.error_summaries import merge_all_summaries
from storage.layout.segments import COMMITS_FOLDER, SEGMENTS_FOLDER, Segment

HEAD_FOLDER = "head"
SUMMARY_FILE = "dump.json"  # a summary of the last dump; no reader needs it
NUM_CONNECTIONS = 16  # simultaneous requests to an object store

ADVICE = f"delete the part's file in {COMMITS_FOLDER}/ and run the dump again"
_COMMIT_NAME = re.compile(r"part-(\d{5,8})\.json")
_PART_NAME = re.compile(r"part-(\d{5,8})\.[0-9a-f]{12}\.parquet")
_PART_OF_TEMPORARY = re.compile(r"part-(\d{5,8})\..+")


def part_file(family: str, part: int, sha256: str) -> str:
    """Returns the path of a part's file, relative to the cache; it contains the content's hash."""
    return f"{family}/part-{part:05d}.{sha256[:12]}.parquet"


def head_file(sha256: str) -> str:
    """Returns the path of the output head's file, relative to the cache."""
    return f"{HEAD_FOLDER}/head.{sha256[:12]}.safetensors"


def commit_file(segment: Segment, part: int) -> str:
    """Returns the path of a part's commit, relative to the cache."""
    return f"{segment.commits_folder}/part-{part:05d}.json"


def list_committed_parts(folder: Folder, segment: Segment) -> list[int]:
    """Returns the numbers of the parts that have a commit file, ascending; reads file names only."""
    matches = [_COMMIT_NAME.fullmatch(_base_name(name)) for name in folder.list_files(segment.commits_folder)]
    return sorted(int(match[1]) for match in matches if match)


def read_commit(folder: Folder, segment: Segment, part: int) -> tuple[Commit, str]:
    """Reads a part's commit; returns it with the sha256 of its bytes.

    Errors: FileNotFoundError; CorruptPartError if it is damaged or belongs to another cache.
    """
    name = commit_file(segment, part)
    place, content = folder.locate(name), folder.read(name)
    commit = parse_document(content, Commit, place)
    if commit.cache_sha256 != segment.sha256:
        raise CorruptPartError(f"{place}: belongs to another {segment.file}; delete it and run the dump again")
    families = set(segment.stored_families)
    if commit.part != part or set(commit.families) != families or part not in segment.parts:
        raise CorruptPartError(
            f"{place}: describes part {commit.part} with {sorted(commit.families)}, expected part {part} of "
            f"{segment.parts.start} to {segment.parts.stop - 1} with {sorted(families)}"
        )
    for family, entry in commit.families.items():
        if entry.file != part_file(family, part, entry.sha256):
            raise CorruptPartError(f"{place}: names {entry.file!r}, expected its own {family} file")
    if (commit.head is None) == ("hidden" in families):
        raise CorruptPartError(f"{place}: must name an output head where there are hidden states, and only there")
    if commit.head is not None and commit.head.file != head_file(commit.head.sha256):
        raise CorruptPartError(f"{place}: names {commit.head.file!r}, expected a file of {HEAD_FOLDER}/")
    return commit, hashlib.sha256(content).hexdigest()


def read_commits(folder: Folder, segment: Segment, parts: Sequence[int]) -> list[tuple[Commit, str]]:
    """Reads the commits of several parts, in parallel from an object store. Errors as `read_commit`."""
    if not folder.is_remote:
        return [read_commit(folder, segment, part) for part in parts]
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        return list(pool.map(lambda part: read_commit(folder, segment, part), parts))


def check_file(folder: Folder, entry: FileEntry | HeadEntry, *, content: bool) -> None:
    """Raises CorruptPartError unless a file exists with the committed size (and sha256, if `content`)."""
    try:
        size = folder.size(entry.file)
        sha256 = folder.sha256(entry.file) if content and size == entry.file_bytes else entry.sha256
    except OSError as error:
        raise _make_read_error(folder, entry, error) from error
    check_size_and_hash(folder, entry, size, sha256)


def read_head(folder: Folder, entry: HeadEntry, vocab_size: int) -> StoredHead:
    """Reads the output head of a cache. CorruptPartError for a damaged file or another vocabulary size."""
    try:
        content = folder.read(entry.file)
    except OSError as error:
        raise _make_read_error(folder, entry, error) from error
    check_size_and_hash(folder, entry, len(content), hashlib.sha256(content).hexdigest())
    place = folder.locate(entry.file)
    try:
        head = decode_head(content)
    except CorruptPartError as error:
        raise CorruptPartError(f"{place}: {error}") from error
    if head.vocab_size != vocab_size:
        raise CorruptPartError(f"{place}: has {head.vocab_size} tokens, the vocabulary has {vocab_size}")
    return head


def _make_read_error(folder: Folder, entry: FileEntry | HeadEntry, error: OSError) -> CorruptPartError:
    return CorruptPartError(f"{folder.locate(entry.file)}: cannot be read: {error.strerror or error}; {ADVICE}")


def check_size_and_hash(folder: Folder, entry: FileEntry | HeadEntry, size: int, sha256: str) -> None:
    """Raises CorruptPartError unless a file's size and sha256 are the committed ones."""
    place = folder.locate(entry.file)
    if size != entry.file_bytes:
        raise CorruptPartError(f"{place}: has {size} bytes, its commit says {entry.file_bytes}; {ADVICE}")
    if sha256 != entry.sha256:
        raise CorruptPartError(f"{place}: sha256 is {sha256}, its commit says {entry.sha256}; {ADVICE}")


def read_manifest(folder: Folder, segment: Segment) -> Manifest | None:
    """Reads a segment's manifest; None if it is not sealed. Errors: CorruptPartError."""
    place = folder.locate(segment.manifest_file)
    try:
        manifest = parse_document(folder.read(segment.manifest_file), Manifest, place)
    except FileNotFoundError:
        return None
    if manifest.cache_sha256 != segment.sha256:
        raise CorruptPartError(f"{place}: belongs to another {segment.file}; run the dump again")
    parts = range(segment.first_part, segment.first_part + len(manifest.commits))
    if [entry.file for entry in manifest.commits] != [commit_file(segment, part) for part in parts]:
        raise CorruptPartError(f"{place}: does not list the commits of parts {parts.start} to {parts.stop - 1}")
    return manifest


def make_manifest(
    segment: Segment, commits: Sequence[tuple[Commit, str]], engine_check: EngineCheckEntry | None = None
) -> Manifest:
    """Makes the manifest of all parts in order; the same commits and engine check give the same bytes."""
    families = commits[0][0].families if commits else {}
    head = commits[0][0].head if commits else None
    entries = [CommitEntry(file=commit_file(segment, commit.part), sha256=sha256) for commit, sha256 in commits]
    return Manifest(
        format_version=segment.format_version,
        cache_sha256=segment.sha256,
        num_samples=sum(commit.num_samples for commit, _ in commits),
        num_errors=sum(len(commit.errors) for commit, _ in commits),
        num_rows=count_rows([commit for commit, _ in commits]),
        bytes_by_family={
            **{family: sum(commit.families[family].file_bytes for commit, _ in commits) for family in families},
            **({} if head is None else {HEAD_FOLDER: head.file_bytes}),
        },
        commits=tuple(entries),
        head=head,
        engine_check=engine_check,
        index=None,
        **merge_all_summaries([commit for commit, _ in commits]),
    )


def count_rows(commits: Sequence[Commit]) -> dict[str, int]:
    """Returns the number of distribution rows of all commits, by family."""
    families = dict.fromkeys(family for commit in commits for family in commit.num_rows)
    return {family: sum(commit.num_rows.get(family, 0) for commit in commits) for family in families}


def check_one_head(commits: Iterable[Commit]) -> HeadEntry | None:
    """Returns the output head that all commits with hidden states name; None if there are none.

    Errors: CacheError if commits name different heads.
    """
    heads = {commit.head.sha256: commit for commit in commits if commit.head is not None}
    if len(heads) > 1:
        raise CacheError(
            f"parts {', '.join(str(commit.part) for commit in heads.values())} name different output heads, "
            f"{', '.join(heads)}; keep the commits of one head in {COMMITS_FOLDER}/, delete the other commits, "
            "and run the dump again"
        )
    return next((commit.head for commit in heads.values()), None)


def remove_orphans(folder: Folder, segment: Segment, commits: Sequence[Commit]) -> list[str]:
    """Deletes files of a complete segment that no commit names, left by killed or slower writers.

    Returns their names. Safe while other writers run: a committed part gets no second commit, so no one
    needs these files; a writer whose temporary file is deleted writes it again.
    """
    named = {entry.file for commit in commits for entry in commit.families.values()}
    parts = {commit.part for commit in commits}
    orphans = []
    for sub in (segment.commits_folder, *segment.stored_families):
        for name in folder.list_files(sub):
            match = _PART_NAME.fullmatch(_base_name(name))
            beaten = match is not None and int(match[1]) in parts and name not in named
            if beaten or (files.is_temporary(_base_name(name)) and _parse_part_number(name) in parts):
                orphans.append(name)
    for sub in ("", SEGMENTS_FOLDER):
        orphans += [name for name in folder.list_files(sub) if files.is_temporary(_base_name(name))]
    heads = {commit.head.file for commit in commits if commit.head is not None}
    if heads:  # no other segment's commits can name another one
        orphans += [name for name in folder.list_files(HEAD_FOLDER) if name not in heads]
    for name in orphans:
        folder.remove(name)
    return orphans


def _parse_part_number(name: str) -> int | None:
    match = _PART_OF_TEMPORARY.fullmatch(_base_name(name))
    return None if match is None else int(match[1])


def _base_name(name: str) -> str:
    return name.rpartition("/")[2]
