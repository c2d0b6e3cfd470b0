"""Stores the teacher's tokenizer and processor files in a cache, so that it is usable without the teacher.

The files lie in processor/ and are written before `cache.json`, which lists each with its sha256.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from storage.backends.folder import Folder
from storage.errors import CorruptPartError
from storage.layout.documents import NamedFile

_log = logging.getLogger(__name__)
PROCESSOR_FOLDER = "processor"
MAX_BYTES = 64 << 20  # of one file: vocabularies have up to 35 MB
# Data only, no code. config.json gives the number of positions and the ids of an image.
NAMES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def read_processor_files(checkpoint: Path) -> dict[str, bytes]:
    """Reads a checkpoint's tokenizer and processor files, by name; skips files beyond MAX_BYTES."""
    contents = {}
    for path in (checkpoint / name for name in NAMES):
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > MAX_BYTES:
            _log.warning(
                "%s: has %d bytes; the cache stores files of at most %d bytes and leaves it out", path, size, MAX_BYTES
            )
            continue
        contents[path.name] = path.read_bytes()
    return contents


def write_processor_files(folder: Folder, contents: Mapping[str, bytes]) -> tuple[NamedFile, ...]:
    """Writes files under names that contain their hash, so that writers agree; returns their entries."""
    if contents:
        folder.make_folders([PROCESSOR_FOLDER])
    entries = []
    for name, content in sorted(contents.items()):
        sha256 = hashlib.sha256(content).hexdigest()
        entry = NamedFile(name=name, file=_make_file_name(name, sha256), file_bytes=len(content), sha256=sha256)
        folder.write(entry.file, content)
        entries.append(entry)
    return tuple(entries)


def load_processor_files(folder: Folder, entries: Sequence[NamedFile]) -> dict[str, bytes]:
    """Reads the files' contents, by name, and checks their hashes. Errors: CorruptPartError."""
    contents = {}
    for entry in entries:
        place = folder.locate(entry.file)
        if entry.name not in NAMES or entry.file != _make_file_name(entry.name, entry.sha256):
            raise CorruptPartError(
                f"{place}: cache.json names {entry.name!r} so, expected a file of {PROCESSOR_FOLDER}/"
            )
        try:
            content = folder.read(entry.file)
        except OSError as error:
            raise CorruptPartError(f"{place}: cannot be read: {error}") from error
        if (found := hashlib.sha256(content).hexdigest()) != entry.sha256:
            raise CorruptPartError(f"{place}: sha256 is {found}, cache.json says {entry.sha256}; copy the cache again")
        contents[entry.name] = content
    return contents


def _make_file_name(name: str, sha256: str) -> str:
    return f"{PROCESSOR_FOLDER}/{sha256[:12]}.{name}"
