"""The progress of a dump: its line on the terminal, its metrics, and its summary in dump.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm import tqdm

from storage.records.records import SampleError

if TYPE_CHECKING:  # imports torch
    from teacher_dump.workers.worker import PartOutcome

_PLACE = re.compile(r"^\S+(?::\d+|\[\d+\]): ")  # of a row in its file
_VARYING = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|0x[0-9a-f]+|\d[\d.,]*""")  # names, paths and numbers
_KIND_CHARACTERS = 160


@dataclass(frozen=True)
class DumpSummary:
    """The content of dump.json, about the run that wrote parts last.

    `seconds` is the time of the scoring phase: from the first part of the first worker with a loaded teacher to
    the last commit; the start of Ray and engines is not included. `num_tokens` counts the positions that the
    teacher scored, visual tokens included (0 without a teacher); `tokens_per_s` is num_tokens / seconds over all
    workers.
    """

    num_samples: int  # with a record
    num_parts_written: int
    num_tokens: int
    num_bytes: int  # of the parts' files
    seconds: float
    tokens_per_s: float
    num_errors: int
    peak_memory_bytes: int  # of the worker that needed most
    num_cut: int = 0  # samples with a record that data.too_long has cut
    error_kinds: dict[str, int] = field(default_factory=dict)  # of all samples without a record, by reason


@dataclass
class Progress:
    """Sums over the parts written so far, and the planned totals."""

    num_samples_planned: int
    num_parts_planned: int
    num_samples: int = 0
    num_parts: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_errors: int = 0
    num_cut: int = 0
    peak_memory_bytes: int = 0
    started: float = float("inf")
    finished: float = 0.0

    def add(self, outcome: PartOutcome) -> None:
        """Adds one part's outcome."""
        self.num_parts += 1
        self.num_samples += outcome.num_samples
        self.num_tokens += outcome.num_tokens
        self.num_bytes += outcome.num_bytes
        self.num_errors += outcome.num_errors
        self.num_cut += outcome.num_cut
        self.peak_memory_bytes = max(self.peak_memory_bytes, outcome.peak_memory_bytes)
        self.started = min(self.started, outcome.started)
        self.finished = max(self.finished, outcome.finished)

    @property
    def seconds(self) -> float:
        """The duration of the scoring phase; 0 before its first part has ended."""
        return max(self.finished - self.started, 0.0)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The estimated remaining time, from the parts so far; None before the first."""
        if not self.num_parts:
            return None
        return self.seconds / self.num_parts * max(self.num_parts_planned - self.num_parts, 0)

    def line(self) -> str:
        """Formats parts, speed, bytes, errors and time left for a terminal."""
        left = "" if self.seconds_left is None else f", {tqdm.format_interval(self.seconds_left)} left"
        return (
            f"{self.num_parts:,}/{self.num_parts_planned:,} parts, {self.tokens_per_s:,.0f} tokens/s, "
            f"{tqdm.format_sizeof(self.num_bytes, 'B')}, {self.num_errors:,} errors{left}"
        )

    def summary(self, errors: Iterable[SampleError] = ()) -> DumpSummary:
        """Summarizes the parts so far; `errors` are those of the whole cache segment."""
        return DumpSummary(
            num_samples=self.num_samples,
            num_parts_written=self.num_parts,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            seconds=round(self.seconds, 3),
            tokens_per_s=round(self.tokens_per_s, 1),
            num_errors=self.num_errors,
            peak_memory_bytes=self.peak_memory_bytes,
            num_cut=self.num_cut,
            error_kinds=count_error_kinds(errors),
        )


def count_error_kinds(errors: Iterable[SampleError]) -> dict[str, int]:
    """Counts failed samples by kind of reason, the most frequent first.

    A kind is a reason without its place, and without names, paths and numbers, which differ by sample.
    """
    kinds = Counter(_VARYING.sub("…", _PLACE.sub("", error.reason))[:_KIND_CHARACTERS] for error in errors)
    return dict(kinds.most_common())
