"""The ledger of an experiment: which steps are done, and from what they were made.

A step is a name and the fingerprint of everything that it depends on. Its entry is one JSON file
under <run>/steps/, written after the step's own outputs, so its existence means that they are whole.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.backends.disk import explain_write_errors
from storage.backends.folder import open_folder, write_atomically
from storage.backends.lock import Lock, hold_lock
from storage.field_changes import describe_changes
from storage.layout.segments import read_segments


@dataclass(frozen=True)
class Ledger:
    """Finished steps of one experiment, kept in `folder`."""

    folder: Path

    def is_done(self, step: str, inputs: dict[str, Any], outputs: list[Path]) -> bool:
        """Whether `step` finished from exactly these inputs and its outputs still exist."""
        return self._entry(step).get("fingerprint") == fingerprint(inputs) and all(path.exists() for path in outputs)

    def reasons(self, step: str, inputs: dict[str, Any], outputs: list[Path]) -> list[str]:
        """Why a step that finished once is done again: fields that changed, with both values, and lost outputs.

        Empty for a step that has never finished.
        """
        entry = self._entry(step)
        if "inputs" not in entry:
            return []
        gone = [f"{path}: is gone" for path in outputs if not path.exists()]
        return [*describe_changes(entry["inputs"], inputs), *gone]

    def record(self, step: str, inputs: dict[str, Any], **facts: Any) -> None:
        """Notes that `step` is finished; its outputs must be on disk already."""
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"step": step, "fingerprint": fingerprint(inputs), "inputs": inputs, **facts}
        write_atomically(self._path(step), json.dumps(entry, indent=1, default=str).encode())

    def _entry(self, step: str) -> dict[str, Any]:
        try:
            entry = json.loads(self._path(step).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def _path(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def lock_run(run: Path) -> AbstractContextManager[Lock]:
    """The lock on a run's folder, of the one `run` or `ablate` that works there. HeldError names who has it.

    Dumps and stages have places of their own: a dump shares its work with others, a stage locks its output.
    """
    return hold_lock(run / "lock", f"the run {run}")


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of every file in a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        digest.update(file.relative_to(path.parent).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cache_fingerprint(path: str) -> str:
    """sha256 of what says all that is in a cache: its segments and their manifests. CacheError: there is none."""
    folder, digest = open_folder(path), hashlib.sha256()
    for segment in read_segments(folder):
        digest.update(segment.sha256.encode())
        with suppress(FileNotFoundError):  # a segment that grows has no manifest
            digest.update(folder.read(segment.manifest_file))
    return digest.hexdigest()
