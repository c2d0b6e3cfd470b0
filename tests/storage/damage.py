"""Damages the files of a cache, for tests that must detect it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from storage.reader.cache import Cache


def list_all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bytes(files: Sequence[Path], count: int) -> Iterator[str]:
    """Yields each file with one changed byte, `count` times at random positions; then restores the file."""
    rng = random.Random(0)
    for path in files:
        content = path.read_bytes()
        for _ in range(count):
            damaged = bytearray(content)
            position = rng.randrange(len(content))
            damaged[position] ^= rng.randrange(1, 256)
            path.write_bytes(damaged)
            yield f"byte {position} of {path}"
        path.write_bytes(content)


def read_everything(folder: Path) -> None:
    """Reads a whole cache without file checksums, so that decoders see the damage."""
    cache = Cache.open(folder, checksums=False)
    for index in range(cache.num_samples):
        tokens = cache.read(index).tokens
        for image in tokens.images if "images" in cache.families else ():
            cache.image_bytes(index, image.sha256)


def set_value(name: str, row: int, value: Any) -> Callable[[dict[str, list]], dict[str, list]]:
    """Returns a change of columns: sets a value, or the result of `value` for the old one."""

    def change(columns: dict[str, list]) -> dict[str, list]:
        columns[name][row] = value(columns[name][row]) if callable(value) else value
        return columns

    return change


def set_plain_id(row: int, sample_id: str) -> Callable[[dict[str, list]], dict[str, list]]:
    """Returns a change of the columns of tokens: makes a row a sample of its own, with this id."""

    def change(columns: dict[str, list]) -> dict[str, list]:
        for name, value in {"sample_id": sample_id, "row_id": sample_id, "half": "", "copy": 0}.items():
            columns[name][row] = value
        return columns

    return change
