"""The identity of a sample. Its text is for people: it is made here, and nothing reads an identity from a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

Half = Literal["chosen", "rejected"]
HALVES: tuple[Half, ...] = get_args(Half)
_MAX_NUMBER = 2**31 - 1  # what the columns hold


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Which row a sample is of, and what of it. Errors: ValueError for another half or a number out of range.

    A cache holds each `sample_id` once, so two keys with the same text cannot be in one cache.
    """

    row_id: str  # the row's own id, or file name and row number under `ids: position`
    half: Half | None = None  # of a preference pair
    copy: int = 0  # the copies of a row whose source has a weight above 1 count from 0
    source: int = 0  # the source's position in data.sources

    def __post_init__(self) -> None:
        if self.half is not None and self.half not in HALVES:
            raise ValueError(f"half of sample {self.row_id!r} is {self.half!r}, expected one of {HALVES} or None")
        if not (0 <= self.copy <= _MAX_NUMBER and 0 <= self.source <= _MAX_NUMBER):
            raise ValueError(
                f"sample {self.row_id!r}: copy {self.copy} of source {self.source}, expected 0 to {_MAX_NUMBER:,}"
            )

    @property
    def sample_id(self) -> str:
        """Returns the id that people see and type, such as `a~2#chosen`: the second copy's chosen half."""
        copy = f"~{self.copy + 1}" if self.copy else ""
        return f"{self.row_id}{copy}#{self.half}" if self.half else f"{self.row_id}{copy}"

    def as_json(self) -> list[str | int | None]:
        """Returns plain data; `SampleKey(*data)` inverts it."""
        return [self.row_id, self.half, self.copy, self.source]

    @property
    def whole(self) -> SampleKey:
        """Returns what both halves of a preference pair have in common."""
        return replace(self, half=None)

    @property
    def other_half(self) -> SampleKey:
        """Returns the key of the other half of a preference pair."""
        return replace(self, half="rejected" if self.half == "chosen" else "chosen")
