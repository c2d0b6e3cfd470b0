"""Reads Hugging Face data sets: a folder of `save_to_disk`, or a Hub id. The only file that imports datasets."""

from __future__ import annotations

from pathlib import Path

from storage.errors import ConfigError
from teacher_dump.data.sources.parquet_rows import to_plain_rows
from teacher_dump.data.sources.row import SourceRows

_ROWS_PER_BATCH = 64


def read_hub_rows(path: str, *, subset: str | None, hub_split: str, revision: str | None) -> SourceRows:
    """Yields rows of a data set as plain data, images undecoded.

    A folder is read in place; any other path is a Hub id, whose files `datasets` downloads. No code of a
    data set is run. Raises ConfigError if there is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.sources: {path}: needs the package datasets (pip install stillhouse[datasets]): {error}"
        ) from error
    try:
        if Path(path).is_dir():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, subset, split=hub_split, revision=revision)
    except Exception as error:  # it raises its own kinds, and those of its file systems
        raise ConfigError(f"data.sources: {path}: cannot be loaded as a data set: {error}") from error
    if isinstance(found, dict):
        if hub_split not in found:
            raise ConfigError(f"data.sources: {path}: has no split {hub_split!r}, only {', '.join(map(str, found))}")
        found = found[hub_split]
    number = 0
    for batch in found.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        for row in to_plain_rows(batch):
            yield f"{Path(path).name}[{number}]", row
            number += 1
