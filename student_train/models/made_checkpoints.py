"""Makes the checkpoint at a stage's `init` from other checkpoints, once: composed or pruned.

A record beside its weights says what it was made from, so that it is kept while that is the same and refused, or made
again, when it has changed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from storage.backends.folder import write_json
from storage.backends.lock import hold_lock
from storage.errors import ConfigError, StillhouseError
from storage.field_changes import describe_changes
from student_train.models.checkpoint import recover_checkpoint, save_checkpoint

RECORD = "composition.json"  # inputs of a made checkpoint, inside it
_VERBS = {"compose": "composed", "prune": "pruned"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """How a checkpoint is made, and from what."""

    field: Literal["compose", "prune"]  # of the stage
    describe: Callable[[], Mapping[str, Any]]  # the inputs, as JSON
    build: Callable[[], Any]  # the model
    processor: str | Callable[[Path], object]  # checkpoint whose processor is copied, or what writes one to a folder


def ensure_made(
    making: Making,
    folder: str | Path,
    *,
    replaces: bool = False,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Make the checkpoint at `folder`, unless it exists and was made from the same inputs. Call it on one rank.

    `replaces`: whether to replace a checkpoint that was made from other inputs. `check` is called with the new
    checkpoint before it is moved to `folder`; if it raises, nothing is left. Errors: those of `making`; ConfigError
    for a checkpoint that was made from other inputs.
    """
    folder = Path(folder)
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with hold_lock(
            folder.with_name(f"{folder.name}~lock"),
            f"the {_VERBS[making.field]} checkpoint {folder}",
            patience_s=math.inf,
        ):
            recover_checkpoint(folder)
            inputs = {**making.describe(), **({} if making.field == "compose" else {"made_by": making.field})}
            if not _is_made(folder, making.field, inputs, replaces=replaces):
                _make_into(folder, making, inputs, check)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not empty: another process writes there
                parent.rmdir()
        raise


def _is_made(folder: Path, field: Literal["compose", "prune"], inputs: Mapping[str, Any], *, replaces: bool) -> bool:
    """Return whether the checkpoint exists and can be kept. ConfigError if it was made from other inputs."""
    if not folder.is_dir():
        return False
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _log.warning("%s has no %s, so its inputs are unknown; it is used unchanged", folder, RECORD)
        return True
    maker = recorded.get("made_by", "compose") if isinstance(recorded, dict) else None
    if maker not in ("compose", "prune"):
        raise ConfigError(
            f"{folder / RECORD}: got {str(recorded)[:80]}, expected a record of compose or prune; remove the folder to "
            "make it anew, or give init another folder"
        )
    other = _VERBS[maker]
    verb = _VERBS[field]
    if other == verb:
        changes = describe_changes(recorded, inputs, field)
    else:
        changes = [f"it was {other}, but the stage has {field}"]
    if changes and not replaces:
        raise ConfigError(
            f"{folder} was {other} from other inputs; give init another folder, or undo the change, or "
            f"{field} it again and train with --again (a finished stage) or --restart (an unfinished one):"
            + "".join(f"\n  {change}" for change in changes)
        )
    if changes:
        _log.warning("%s is %s again:%s", folder, verb, "".join(f"\n  {change}" for change in changes))
    return not changes


def _make_into(folder: Path, making: Making, inputs: Mapping[str, Any], check: Callable[[Path], object] | None) -> None:
    def finish(new: Path) -> None:
        write_json(new / RECORD, inputs)
        if check is None:
            return
        try:
            check(new)
        except StillhouseError as error:  # its message names the temporary folder
            raise type(error)(str(error).replace(str(new), str(folder))) from error

    with TemporaryDirectory() as made:
        source = making.processor
        if not isinstance(source, str):
            source(Path(made))
            source = made
        save_checkpoint(making.build(), folder, source, beside=finish)
