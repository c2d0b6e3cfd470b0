"""Decides whether a stage is trained or already finished, and replaces the result of a stage that is retrained.

    <output>/           the result, or the stage during its first training
    <output>~again/     the stage while it is retrained; renamed to <output> when it is complete
    <output>~before/    the old result, between the two renames
    <output>~lock       the lock of the command that works on the stage

The first rank decides, under the lock, and tells the others.
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
from student_train.models.checkpoint import recover_checkpoint
from student_train.training.resume import StageState
from student_train.training.stage_inputs import compare_result_inputs, read_record
from student_train.training.stage_request import StageRequest

ORPHAN_PATIENCE_S = 20.0  # ranks whose parent was killed end within this time
SUMMARY = "summary.json"  # written last: the stage is finished


@dataclass(frozen=True)
class StageDecision:
    """Whether the stage trains, and its folder."""

    folder: Path  # where it trains, or has its result
    trains: bool


def lock_stage(
    stage: StageSection, name: str, *, patience_s: float = ORPHAN_PATIENCE_S
) -> AbstractContextManager[Lock]:
    """Lock a resolved stage's output. Errors as `hold_lock`."""
    path = _make_sibling_path(Path(stage.output), "lock")
    return hold_lock(path, f"stages.{name}.output, {stage.output},", patience_s=patience_s)


def decide_stage(
    stage: StageSection, name: str, inputs: Mapping[str, Any], request: StageRequest, *, num_ranks: int
) -> StageDecision:
    """Decide whether a resolved stage trains. Call it on one rank, under the lock; only `restart` deletes a state.

    Errors: ConfigError for a finished result or a state made from other inputs, with each field and both values.
    """
    output = Path(stage.output)
    again = _make_sibling_path(output, "again")
    finish_swap(output)
    if request.restart:
        _discard_state(output)
        _discard_state(again)
    if is_finished(again):  # but not renamed yet
        if request.again != "never" and _compare_inputs(again, inputs, name) == []:
            return StageDecision(again, trains=False)
        swap_result(output)
    folder = output
    if is_finished(output):
        changes = _compare_inputs(output, inputs, name)
        if changes == [] and request.again != "always":
            return StageDecision(output, trains=False)
        if request.again == "never":
            raise ConfigError(_explain_refusal(output, name, changes))
        folder = again
    StageState.of(folder, name, inputs, num_ranks=num_ranks).find_newest()
    return StageDecision(folder, trains=True)


def is_finished(folder: Path) -> bool:
    """Return whether a stage's folder holds a complete result."""
    return (folder / SUMMARY).is_file() and (folder / "config.json").is_file()


def install_result(decision: StageDecision, stage: StageSection) -> None:
    """Make a retrained result the stage's result; the old one is kept until then."""
    if decision.folder != Path(stage.output):
        swap_result(Path(stage.output))


def swap_result(output: Path) -> None:
    """Replace a result by the retrained one. `finish_swap` completes this after a kill."""
    again, before = _make_sibling_path(output, "again"), _make_sibling_path(output, "before")
    if output.exists():
        shutil.rmtree(before, ignore_errors=True)
        output.rename(before)
    again.rename(output)
    sync(output.parent)
    shutil.rmtree(before, ignore_errors=True)


def finish_swap(output: Path) -> None:
    """Complete a swap that a kill interrupted."""
    again, before = _make_sibling_path(output, "again"), _make_sibling_path(output, "before")
    recover_checkpoint(output)
    if not output.exists():
        if is_finished(again):
            again.rename(output)
        elif before.exists():
            before.rename(output)
    if output.exists():
        shutil.rmtree(before, ignore_errors=True)


def _compare_inputs(folder: Path, inputs: Mapping[str, Any], name: str) -> list[str] | None:
    """Return the inputs in which a result differs; None if its folder does not record them."""
    record = read_record(folder)
    return None if record is None else compare_result_inputs(record, inputs, name)


def _explain_refusal(output: Path, name: str, changes: list[str] | None) -> str:
    ways = (
        "--again retrains it and replaces the result when the new one is complete; "
        "or undo the change, or give the stage another output"
    )
    if changes is None:
        return (
            f"stages.{name}: {output} holds a finished result of unknown inputs "
            f"(there is no inputs.json, which earlier versions did not write); {ways}"
        )
    return f"stages.{name}: {output} is finished, but was made from other inputs; {ways}:" + "".join(
        f"\n  {change}" for change in changes
    )


def _discard_state(folder: Path) -> None:
    """Delete an unfinished training's state; a finished result stays."""
    state = folder / "state"
    given_up = folder / "state~given-up"
    shutil.rmtree(given_up, ignore_errors=True)
    if state.exists():
        state.rename(given_up)  # atomic, so that a kill leaves no partial state
        shutil.rmtree(given_up, ignore_errors=True)


def _make_sibling_path(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}~{what}")
