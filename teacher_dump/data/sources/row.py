"""The rows that every source yields, each with its place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_dump.data.sample import MAX_SHOWN

SourceRows = Iterator[tuple[str, Any]]  # (place, fields as plain data or a BrokenRow)


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read; only its place is known."""

    reason: str


def shorten_path(path: Path) -> str:
    """Returns folder and file name only, since the plan's fingerprint must not depend on where data lie."""
    return make_printable("/".join(path.resolve().parts[-2:]))


def make_printable(name: str) -> str:
    """Returns a name that UTF-8 can encode: invalid bytes of file names become question marks."""
    return name.encode("utf-8", "replace").decode()


def shorten_name(name: str) -> str:
    """Returns a name for an error message, at most `MAX_SHOWN` characters of it."""
    text = make_printable(name)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
