"""Records which steps of an experiment are finished, with the inputs of each.

A step has a name and the fingerprint of all its inputs. Its entry is a JSON file under <run>/steps/, which is written
after the outputs of the step, so its existence means that they are complete.
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
    """The finished steps of one experiment, a file each in `folder`."""

    folder: Path

    def is_done(self, step: str, inputs: dict[str, Any], outputs: list[Path]) -> bool:
        """Whether `step` finished from exactly these inputs and its outputs still exist."""
        is_same = self._read_entry(step).get("fingerprint") == fingerprint_json(inputs)
        return is_same and all(path.exists() for path in outputs)

    def explain_redo(self, step: str, inputs: dict[str, Any], outputs: list[Path]) -> list[str]:
        """Why a finished step must run again: input fields that changed, with both values, and missing outputs.

        Empty for a step that never finished.
        """
        entry = self._read_entry(step)
        if "inputs" not in entry:
            return []
        missing = [f"{path}: is missing" for path in outputs if not path.exists()]
        return [*describe_changes(entry["inputs"], inputs), *missing]

    def record(self, step: str, inputs: dict[str, Any], **facts: Any) -> None:
        """Writes the entry of a finished `step`, with `facts` about it. Its outputs must be on disk already."""
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"step": step, "fingerprint": fingerprint_json(inputs), "inputs": inputs, **facts}
        write_atomically(self._get_path(step), json.dumps(entry, indent=1, default=str).encode())

    def _read_entry(self, step: str) -> dict[str, Any]:
        try:
            entry = json.loads(self._get_path(step).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def _get_path(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def lock_run(run: Path) -> AbstractContextManager[Lock]:
    """The lock on a run's folder, which `run` and `ablate` hold. HeldError names the process that holds it.

    `dump` and `train` do without: several dumps may share the work on one cache, and a stage locks its own output.
    """
    return hold_lock(run / "lock", f"the run {run}")


def fingerprint_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_path(path: Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of every file in a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        digest.update(file.relative_to(path.parent).as_posix().encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint_cache(path: str) -> str:
    """sha256 of a cache's segment documents and manifests, which list all its files. CacheError if there is none."""
    folder, digest = open_folder(path), hashlib.sha256()
    for segment in read_segments(folder):
        digest.update(segment.sha256.encode())
        with suppress(FileNotFoundError):  # an unfinished segment has no manifest
            digest.update(folder.read(segment.manifest_file))
    return digest.hexdigest()
