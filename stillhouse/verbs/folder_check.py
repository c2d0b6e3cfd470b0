"""The check of a folder that an argument names."""

from __future__ import annotations

from pathlib import Path

from storage.errors import ConfigError


def check_folder(path: Path, name: str) -> None:
    """ConfigError if the folder of the argument `name` is not there."""
    if not path.is_dir():
        raise ConfigError(f"{name} {path} is not a folder")
