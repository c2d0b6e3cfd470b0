"""Expands `~` and `$VAR` in paths that come from a YAML file."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expand_path(path: str) -> str:
    """Replaces a leading `~` or `~user` and every `$VAR` or `${VAR}` in a path.

    Errors: ValueError if the user or the variable does not exist.
    """
    expanded = _VARIABLE.sub(_read_variable, path)
    if not expanded.startswith("~"):
        return expanded
    home = os.path.expanduser(expanded)  # noqa: PTH111, which leaves the rest of the path as it is
    if home.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{user} is no user of this machine; write ./~… for a file of that name")
    return home


def _read_variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value
