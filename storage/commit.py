"""Where a cache's files lie, and how parts are committed: exclusively, once, after their files are whole.

<cache>/cache.json, <family>/part-00000.<12 hex of its sha256>.parquet, commits/part-00000.json, manifest.json
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from storage import files
from storage.coding_errors import total as total_errors
from storage.documents import Commit, CommitEntry, Description, FileEntry, HeadEntry, Manifest, parse_document
from storage.errors import CacheError, CorruptPartError
from storage.identity import FORMAT_VERSION
from storage.schema import FAMILIES

CACHE_FILE = "cache.json"
MANIFEST_FILE = "manifest.json"
COMMITS_FOLDER = "commits"
HEAD_FOLDER = "head"

_COMMIT_NAME = re.compile(r"part-(\d{5,8})\.json")
_PART_NAME = re.compile(r"part-(\d{5,8})\.[0-9a-f]{12}\.parquet")


def part_file(family: str, part: int, sha256: str) -> str:
    """The name of a part's file, relative to the cache: its content decides it."""
    return f"{family}/part-{part:05d}.{sha256[:12]}.parquet"


def head_file(sha256: str) -> str:
    """The name of the output head's file, relative to the cache."""
    return f"{HEAD_FOLDER}/head.{sha256[:12]}.safetensors"


def commit_file(part: int) -> str:
    """The name of a part's commit, relative to the cache."""
    return f"{COMMITS_FOLDER}/part-{part:05d}.json"


def read_description(folder: Path) -> tuple[Description, str]:
    """cache.json and the sha256 of its bytes. Errors: CacheError where there is no cache."""
    place = folder / CACHE_FILE
    try:
        content = files.read_bytes(place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(f"{folder}: no cache is here ({CACHE_FILE} is missing); run the dump") from error
    description = parse_document(content, Description, str(place))
    unknown = [family for family in description.families if family not in FAMILIES]
    if unknown or len(set(description.families)) != len(description.families):
        raise CorruptPartError(f"{place}: families are {description.families}, expected some of {FAMILIES}")
    return description, hashlib.sha256(content).hexdigest()


def commit_numbers(folder: Path) -> list[int]:
    """The parts that have a commit file, in order. Nothing is read."""
    matches = [_COMMIT_NAME.fullmatch(path.name) for path in (folder / COMMITS_FOLDER).glob("*.json")]
    return sorted(int(match[1]) for match in matches if match)


def read_commit(folder: Path, part: int, description: Description, cache_sha256: str) -> tuple[Commit, str]:
    """A part's commit and the sha256 of its bytes.

    Errors: FileNotFoundError, CorruptPartError if it is damaged or belongs to another cache.
    """
    place = folder / commit_file(part)
    content = files.read_bytes(place)
    commit = parse_document(content, Commit, str(place))
    if commit.cache_sha256 != cache_sha256:
        raise CorruptPartError(f"{place}: belongs to another {CACHE_FILE}; delete it and run the dump again")
    families = {"tokens", *description.families}
    if commit.part != part or set(commit.families) != families or part >= description.identity.num_parts:
        raise CorruptPartError(
            f"{place}: is about part {commit.part} with {sorted(commit.families)}, expected part {part} of "
            f"{description.identity.num_parts} with {sorted(families)}"
        )
    for family, entry in commit.families.items():
        if entry.file != part_file(family, part, entry.sha256):
            raise CorruptPartError(f"{place}: names {entry.file!r}, expected its own {family} file")
    if (commit.head is None) == ("hidden" in families):
        raise CorruptPartError(f"{place}: must name an output head where there are hidden states, and only there")
    if commit.head is not None and commit.head.file != head_file(commit.head.sha256):
        raise CorruptPartError(f"{place}: names {commit.head.file!r}, expected a file of {HEAD_FOLDER}/")
    return commit, hashlib.sha256(content).hexdigest()


def check_file(folder: Path, entry: FileEntry | HeadEntry, *, content: bool) -> None:
    """CorruptPartError unless a part's file is there and has the committed size (and bytes, if asked)."""
    path = folder / entry.file
    advice = f"delete the part's file in {COMMITS_FOLDER}/ and run the dump again"
    try:
        size = path.stat().st_size
        sha256 = files.sha256_of(path) if content and size == entry.file_bytes else entry.sha256
    except OSError as error:
        raise CorruptPartError(f"{path}: cannot be read: {error.strerror}; {advice}") from error
    if size != entry.file_bytes:
        raise CorruptPartError(f"{path}: has {size} bytes, its commit says {entry.file_bytes}; {advice}")
    if sha256 != entry.sha256:
        raise CorruptPartError(f"{path}: sha256 is {sha256}, its commit says {entry.sha256}; {advice}")


def read_manifest(folder: Path, cache_sha256: str) -> Manifest | None:
    """manifest.json, or None while the cache is growing. Errors: CorruptPartError."""
    place = folder / MANIFEST_FILE
    try:
        manifest = parse_document(files.read_bytes(place), Manifest, str(place))
    except FileNotFoundError:
        return None
    if manifest.cache_sha256 != cache_sha256:
        raise CorruptPartError(f"{place}: belongs to another {CACHE_FILE}; run the dump again")
    expected = [commit_file(part) for part in range(len(manifest.commits))]
    if [entry.file for entry in manifest.commits] != expected:
        raise CorruptPartError(f"{place}: does not list the commits of parts 0 to {len(expected) - 1}")
    return manifest


def make_manifest(cache_sha256: str, commits: Sequence[tuple[Commit, str]]) -> Manifest:
    """The manifest of all parts in order: the same commits give the same bytes."""
    families = commits[0][0].families if commits else {}
    head = commits[0][0].head if commits else None
    entries = [CommitEntry(file=commit_file(commit.part), sha256=sha256) for commit, sha256 in commits]
    return Manifest(
        format_version=FORMAT_VERSION,
        cache_sha256=cache_sha256,
        num_samples=sum(commit.num_samples for commit, _ in commits),
        num_errors=sum(len(commit.errors) for commit, _ in commits),
        num_rows=total_rows([commit for commit, _ in commits]),
        bytes_by_family={
            **{family: sum(commit.families[family].file_bytes for commit, _ in commits) for family in families},
            **({} if head is None else {HEAD_FOLDER: head.file_bytes}),
        },
        commits=tuple(entries),
        errors_by_family=total_errors([commit for commit, _ in commits]),
        head=head,
    )


def total_rows(commits: Sequence[Commit]) -> dict[str, int]:
    """Distribution rows by family, over all commits."""
    families = commits[0].num_rows if commits else {}
    return {family: sum(commit.num_rows[family] for commit in commits) for family in families}


def check_one_head(commits: Sequence[Commit]) -> None:
    """CacheError unless all parts were made with one output head."""
    heads = {commit.head.sha256: commit.part for commit in commits if commit.head is not None}
    if len(heads) > 1:
        raise CacheError(
            f"parts {', '.join(map(str, heads.values()))} name different output heads, {', '.join(heads)}; "
            f"delete the commits of all parts but those of one head in {COMMITS_FOLDER}/, and run the dump again"
        )


def remove_orphans(folder: Path, commits: Sequence[Commit]) -> list[Path]:
    """Delete what killed or beaten writers left of committed parts, and return it.

    Safe beside running writers: a committed part can get no second commit, so nobody needs these files.
    """
    named = {entry.file for commit in commits for entry in commit.families.values()}
    parts = {commit.part for commit in commits}
    orphans = []
    for sub in (COMMITS_FOLDER, *FAMILIES):
        for path in sorted((folder / sub).glob("part-*")):
            match = _PART_NAME.fullmatch(path.name)
            beaten = match is not None and int(match[1]) in parts and f"{sub}/{path.name}" not in named
            if beaten or files.is_temporary(path):
                path.unlink(missing_ok=True)
                orphans.append(path)
    heads = {commit.head.file for commit in commits if commit.head is not None}
    for path in sorted((folder / HEAD_FOLDER).glob("head.*")):
        if f"{HEAD_FOLDER}/{path.name}" not in heads:
            path.unlink(missing_ok=True)
            orphans.append(path)
    return orphans
