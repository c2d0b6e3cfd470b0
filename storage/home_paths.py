"""Paths as people write them into a YAML file, with `~` and `$VAR`."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expand_path(path: str) -> str:
    """The path with a leading `~` or `~user`, and every `$VAR` or `${VAR}`, replaced. ValueError: there is no such."""
    expanded = _VARIABLE.sub(_value, path)
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)  # noqa: PTH111, which leaves the rest of the path as it is
    if home.startswith("~"):
        raise ValueError(f"{expanded.partition('/')[0]} is no user of this machine; write ./~… for a file of that name")
    return home


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value
