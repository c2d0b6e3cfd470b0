"""Chooses a source's reader by its `format` or its path."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from storage.errors import ConfigError
from teacher_dump.config import SourceFormat, SourceSection
from teacher_dump.data.sources.hub_rows import read_hub_rows
from teacher_dump.data.sources.json_rows import read_json_rows
from teacher_dump.data.sources.parquet_rows import read_parquet_rows
from teacher_dump.data.sources.row import SourceRows
from teacher_dump.data.sources.webdataset_rows import TarReader

_BY_SUFFIX: Mapping[str, SourceFormat] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".tgz": "webdataset",
    ".tar.gz": "webdataset",
}
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes into its folder


def read_rows(source: SourceSection) -> SourceRows:
    """Yields (place, row) of all rows of a source, in order. Raises ConfigError for a missing source or format."""
    kind = detect_format(source)
    if kind == "datasets":
        yield from read_hub_rows(
            source.path, subset=source.subset, hub_split=source.hub_split, revision=source.revision
        )
        return
    readers: Mapping[SourceFormat, Callable[[Path], SourceRows]] = {
        "json": read_json_rows,
        "parquet": read_parquet_rows,
        "webdataset": TarReader(frozenset(source.ignore)).read_rows,
    }
    for path in _find_files(source.path):
        yield from readers[kind](path)


def detect_format(source: SourceSection) -> SourceFormat:
    """Returns the source's format. Raises ConfigError if neither `format` nor the path tells it."""
    if source.format is not None:
        return source.format
    path = Path(source.path)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return "datasets"
        raise ConfigError(
            f"data.sources: {path}: is a folder that save_to_disk did not write; name its files, as in {path}/*.parquet"
        )
    for suffix, kind in _BY_SUFFIX.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise ConfigError(
        f"data.sources: {path}: its suffix tells no format; expected {', '.join(_BY_SUFFIX)}, or set `format:` to "
        f"json, parquet, webdataset or datasets (a hub id needs the last)"
    )


def _find_files(path: str) -> Iterator[Path]:
    """Yields the file of that name, or the files that a pattern matches, sorted."""
    if Path(path).exists() or not glob.has_magic(path):
        yield Path(path)
        return
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, for a pattern with folders
    if not found:
        raise ConfigError(f"data.sources: {path}: no file matches this pattern")
    yield from map(Path, found)
