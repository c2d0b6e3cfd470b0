"""How other processes find these packages, and not a user's file or folder that has the name of one."""

from __future__ import annotations

import sys
from pathlib import Path

from storage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # holds all four packages
PACKAGES = ("stillhouse", "storage", "student_train", "teacher_dump")


def make_module_command(module: str) -> tuple[str, ...]:
    """The argv of `python -m MODULE`; the current folder is not on sys.path, unless our packages lie there."""
    return (sys.executable, *(() if Path.cwd() == ROOT else ("-P",)), "-m", module)


def check_current_folder() -> None:
    """ConfigError where it was removed: relative paths lead nowhere, and PyTorch's libraries end the process."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder does not exist any more; change to another one first") from error


def find_shadowed_packages(folder: Path) -> list[str]:
    """Our packages that Python would find in `folder`, were it first on sys.path, though they lie elsewhere."""
    if folder.resolve() == ROOT:
        return []
    return [name for name in PACKAGES if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()]
