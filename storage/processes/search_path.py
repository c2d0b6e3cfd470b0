"""Makes child processes import these packages, not a user's file or folder of the same name."""

from __future__ import annotations

import sys
from pathlib import Path

from storage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]  # holds all four packages
PACKAGES = ("stillhouse", "storage", "student_train", "teacher_dump")


def make_module_command(module: str) -> tuple[str, ...]:
    """Returns the argv of `python -m MODULE`, with the current folder on sys.path only if it holds our packages."""
    return (sys.executable, *(() if Path.cwd() == ROOT else ("-P",)), "-m", module)


def check_current_folder() -> None:
    """Raises ConfigError if the current folder was removed: PyTorch's libraries would end the process."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder does not exist any more; change to another one first") from error


def find_shadowed_packages(folder: Path) -> list[str]:
    """Returns the names of our packages that a file or folder in `folder` would shadow on sys.path."""
    if folder.resolve() == ROOT:
        return []
    return [name for name in PACKAGES if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()]
