"""Says how to repeat an experiment: its command and file, the packages that its runs used. All of it recorded."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.reporting.results import Results


def record_command(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What ablations.json keeps of the command that trained a grid."""
    content = file.read_bytes()
    return {"file": str(file), "file_sha256": hashlib.sha256(content).hexdigest(), "overrides": list(overrides)}


def describe_reproduction(results: Results) -> dict[str, Any]:
    """The command (None where an earlier version did not record it), its file, and the packages of all evaluations.

    Several versions of a package are joined by " and ".
    """
    recorded = results.listing.get("command") or {}
    command = None
    if recorded:
        command = shlex.join(["stillhouse", "run", recorded["file"], *recorded["overrides"]])
    versions: dict[str, set[str]] = {}
    unknown = []
    for name, seeds in results.runs.items():
        for entry in seeds:
            for package, version in (entry.get("versions") or {}).items():
                versions.setdefault(package, set()).add(version or "not installed")
        if not all(entry.get("versions") for entry in seeds):
            unknown.append(name)
    return {
        "command": command,
        "file": recorded.get("file"),
        "file_sha256": recorded.get("file_sha256"),
        "versions": {package: " and ".join(sorted(found)) for package, found in versions.items()},
        "runs_without_versions": unknown,
    }


def read_experiment_file(reproduction: Mapping[str, Any]) -> str | None:
    """The text of the experiment's file, if it is still the one that was used."""
    if not reproduction.get("file"):
        return None
    try:
        content = Path(reproduction["file"]).read_bytes()
        is_same = hashlib.sha256(content).hexdigest() == reproduction["file_sha256"]
        return content.decode() if is_same else None
    except (OSError, UnicodeDecodeError):
        return None
