"""What every source gives: rows with the place that each came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_dump.data.sample import MAX_SHOWN

Rows = Iterator[tuple[str, Any]]  # (place, fields as plain data or a Broken)


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read; nothing is known of it but its place."""

    reason: str


def short_place(path: Path) -> str:
    """Folder and file name: the same wherever the data set lies, since it ends up in the plan's fingerprint."""
    return printable("/".join(path.resolve().parts[-2:]))


def printable(name: str) -> str:
    """A name that any file can hold: bytes of file names that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode()


def shown_name(name: str) -> str:
    """A name as a reason shows it."""
    text = printable(name)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
