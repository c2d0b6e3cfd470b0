"""The sections of a YAML file that a dump needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.config import CacheSection
from storage.config_loader import Sections, read_sections
from teacher_dump.config import CheckSection, DataSection, DumpSection, TeacherSection

SCHEMAS = {
    "data": DataSection,
    "teacher": TeacherSection,
    "dump": DumpSection,
    "cache": CacheSection,
    "check": CheckSection,
}


@dataclass(frozen=True)
class DumpSettings:
    """The sections that a dump needs."""

    run: Path  # the run's folder: logs, fingerprints, views of the checkpoint
    data: DataSection
    teacher: TeacherSection
    dump: DumpSection
    cache: CacheSection
    check: CheckSection = field(default_factory=CheckSection)
    answer_selection: dict[str, Any] = field(default_factory=dict)  # who generated the answers, and how; else empty
    answers: Path | None = None  # the folder of generated answers; None: the answers are the data set's

    @staticmethod
    def from_sections(sections: Sections) -> DumpSettings:
        """Makes settings from sections that were read with (at least) `SCHEMAS`."""
        return DumpSettings(sections.run, *(sections[name] for name in SCHEMAS))

    @property
    def logs(self) -> Path:
        """The folder of the run's log files."""
        return self.run / "logs"


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> DumpSettings:
    """Reads the dump's sections of a YAML file. Raises ConfigError for a user's mistake."""
    return DumpSettings.from_sections(read_sections(path, SCHEMAS, overrides))
