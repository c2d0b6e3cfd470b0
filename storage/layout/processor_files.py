"""The tokenizer's and the processor's own files in a cache: what its ids and pixels mean, without the teacher.

`cache.json` names each with its sha256; they lie in processor/ and are written before it.
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
# Data alone, no code. config.json says how many positions an image takes, and which ids stand for it.
NAMES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def read_processor_files(checkpoint: Path) -> dict[str, bytes]:
    """Those of a checkpoint's files that say what its tokenizer and processor are, by name."""
    contents = {}
    for path in (checkpoint / name for name in NAMES):
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > MAX_BYTES:
            _log.warning(
                "%s: has %d bytes; the cache carries files of at most %d and leaves it out", path, size, MAX_BYTES
            )
            continue
        contents[path.name] = path.read_bytes()
    return contents


def write_processor_files(folder: Folder, contents: Mapping[str, bytes]) -> tuple[NamedFile, ...]:
    """Writes files by their content's hash, so that any number of writers agree, and returns their entries."""
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
    """The files' contents by name, each against its hash. Errors: CorruptPartError."""
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
