"""The chat template's arguments that a student was trained with, in `chat_template_arguments.json` beside its weights.

A teacher's template may take arguments, such as `enable_thinking: false`; a cache's identity names them, and the
checkpoints of a stage over that cache carry them, so that `ask` renders a question as training did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import StillhouseError

ARGUMENTS_FILE = "chat_template_arguments.json"


def read_template_arguments(folder: str | Path) -> dict[str, Any]:
    """Return the arguments that a checkpoint names, or an empty dict. StillhouseError: a broken file."""
    path = Path(folder) / ARGUMENTS_FILE
    try:
        arguments = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StillhouseError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StillhouseError(
            f"{path}: is not JSON ({error}); expected an object of template arguments; copy the checkpoint again"
        ) from error
    if not isinstance(arguments, dict):
        raise StillhouseError(
            f"{path}: holds {type(arguments).__name__}, expected an object of template arguments, such as "
            '{"enable_thinking": false}; copy the checkpoint again'
        )
    return arguments


def write_template_arguments(arguments: Mapping[str, Any], folder: Path) -> None:
    """Write the arguments beside a checkpoint's weights; delete the file if there are none."""
    path = folder / ARGUMENTS_FILE
    if arguments:
        path.write_text(f"{json.dumps(dict(arguments), indent=1)}\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
