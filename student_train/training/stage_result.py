"""A stage's result in its output folder: whether it is finished, when it is trained anew, and how that replaces it.

    <output>/           the result, or the stage while it trains for the first time
    <output>~again/     a finished stage while it trains anew; renamed to <output> when all of it is there
    <output>~before/    the old result between the two renames of that
    <output>~lock       of the command that works on it

The first rank alone decides, under the lock, and tells the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.backends.folder import sync
from storage.backends.lock import Lock, hold_lock
from storage.errors import ConfigError
from student_train.config import StageSection
from student_train.models.checkpoint import put_back
from student_train.training.resume import StageState
from student_train.training.stage_inputs import changes_of_result, read_record
from student_train.training.stage_request import Request

ORPHAN_PATIENCE_S = 20.0  # ranks whose parent was killed are about to end, and the next command should find none
SUMMARY = "summary.json"  # written last: the stage is finished


@dataclass(frozen=True)
class Work:
    """What there is to do."""

    folder: Path  # in which the stage trains, or has its result
    trains: bool


def lock_stage(
    stage: StageSection, name: str, *, patience_s: float = ORPHAN_PATIENCE_S
) -> AbstractContextManager[Lock]:
    """The lock on a resolved stage's output. Errors: those of `hold_lock`."""
    path = _beside(Path(stage.output), "lock")
    return hold_lock(path, f"stages.{name}.output, {stage.output},", patience_s=patience_s)


def decide(stage: StageSection, name: str, inputs: Mapping[str, Any], request: Request, *, num_ranks: int) -> Work:
    """What a resolved stage's command has to do. Call it on one rank, under the lock; only `restart` deletes a state.

    Errors: ConfigError for a finished result or a state that other inputs made, with each field and both values.
    """
    output = Path(stage.output)
    again = _beside(output, "again")
    finish_swap(output)
    if request.restart:
        _give_up(output)
        _give_up(again)
    if is_finished(again):  # but not in its place yet
        if request.again != "never" and _changes(again, inputs, name) == []:
            return Work(again, trains=False)
        swap(output)
    folder = output
    if is_finished(output):
        changes = _changes(output, inputs, name)
        if changes == [] and request.again != "always":
            return Work(output, trains=False)
        if request.again == "never":
            raise ConfigError(_refusal(output, name, changes))
        folder = again
    StageState.of(folder, name, inputs, num_ranks=num_ranks).newest()
    return Work(folder, trains=True)


def is_finished(folder: Path) -> bool:
    """Whether a stage's folder holds a whole result."""
    return (folder / SUMMARY).is_file() and (folder / "config.json").is_file()


def put_in_place(work: Work, stage: StageSection) -> None:
    """Make what was trained anew the stage's result; the old one is there until then."""
    if work.folder != Path(stage.output):
        swap(Path(stage.output))


def swap(output: Path) -> None:
    """Replace a result by the one that was trained anew. `finish_swap` mends what a kill leaves of it."""
    again, before = _beside(output, "again"), _beside(output, "before")
    if output.exists():
        shutil.rmtree(before, ignore_errors=True)
        output.rename(before)
    again.rename(output)
    sync(output.parent)
    shutil.rmtree(before, ignore_errors=True)


def finish_swap(output: Path) -> None:
    """Bring a swap to its end that a kill cut short."""
    again, before = _beside(output, "again"), _beside(output, "before")
    put_back(output)
    if not output.exists():
        if is_finished(again):
            again.rename(output)
        elif before.exists():
            before.rename(output)
    if output.exists():
        shutil.rmtree(before, ignore_errors=True)


def _changes(folder: Path, inputs: Mapping[str, Any], name: str) -> list[str] | None:
    """None where the folder does not say what its result was made from."""
    record = read_record(folder)
    return None if record is None else changes_of_result(record, inputs, name)


def _refusal(output: Path, name: str, changes: list[str] | None) -> str:
    ways = (
        "--again trains it anew and replaces the result when the new one is whole; "
        "or undo the change, or give the stage another output"
    )
    if changes is None:
        return (
            f"stages.{name}: {output} holds a finished result that does not say what it was made from "
            f"(there is no inputs.json, which earlier versions did not write); {ways}"
        )
    return f"stages.{name}: {output} is finished, but was made from other inputs; {ways}:" + "".join(
        f"\n  {change}" for change in changes
    )


def _give_up(folder: Path) -> None:
    """Delete an unfinished training's state; a finished result stays."""
    state = folder / "state"
    given_up = folder / "state~given-up"
    shutil.rmtree(given_up, ignore_errors=True)
    if state.exists():
        state.rename(given_up)  # at once, so that a kill leaves no half of it
        shutil.rmtree(given_up, ignore_errors=True)


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}~{what}")
