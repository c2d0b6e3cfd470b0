"""Saves and restores the state of an unfinished stage, so that the same command resumes it.

    <output>/state/step-00000120/   DeepSpeed's files of trained weights and optimizer, by rank
    <output>/state/step-00000120/average.safetensors   with `ema`
    <output>/state/step-00000120/state.json   written last: step, inputs, notes of the loop

States are saved every `save_every` steps, and when the stage is asked to stop. The order of samples, the learning
rate and the random numbers of a step are functions of (seed, step, rank), so this is the whole state, and a resumed
run equals an undisturbed one bit-exactly. DeepSpeed's files are pickles, which only the run that wrote them reads;
a finished stage deletes them, and so does `--restart`. A state of other inputs is refused, never deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.backends.disk import explain_write_errors
from storage.backends.folder import write_json
from storage.errors import ConfigError, WriteError
from storage.processes.stop_signals import Interrupted
from student_train.training.deepspeed_engine import Engine, run_on_first_rank
from student_train.training.ema import WeightAverage
from student_train.training.stage_inputs import compare_state_inputs

_MARKER = "state.json"
_NEW = "new-"  # prefix of a state that is being written
_FIELDS = {"step", "num_ranks", "notes"}
_AVERAGE = "average.safetensors"


class StageStopped(Interrupted):
    """Raised when a stage was asked to stop and has saved its state."""


@dataclass(frozen=True)
class Progress:
    """The number of finished steps, and what the loop remembers of them."""

    step: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)  # a JSON object


@dataclass(frozen=True)
class StageState:
    """The saved states of one stage's output folder."""

    folder: Path
    name: str  # of the stage
    inputs: Mapping[str, Any]  # everything that decides what the stage computes; see stage_inputs.py
    num_ranks: int

    @staticmethod
    def of(output: Path, name: str, inputs: Mapping[str, Any], *, num_ranks: int) -> StageState:
        """Return the states of the stage that trains in the folder `output`."""
        return StageState(output / "state", name, inputs, num_ranks)

    def find_newest(self) -> tuple[Path, Progress] | None:
        """Find the newest complete state and its folder; None if there is none.

        Errors: ConfigError, with each field and both values, if it was made from other inputs or by another number
        of ranks.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            saved = _read_state(folder / _MARKER)
            if saved is not None:
                self._check(folder, saved)
                return folder, Progress(int(saved["step"]), saved["notes"])
        return None

    def _check(self, folder: Path, saved: Mapping[str, Any]) -> None:
        if saved.get("inputs") is None:
            raise ConfigError(
                f"{folder}: this state has no inputs, since an earlier version saved it; discard it with --restart, "
                "which starts the stage again, or finish the stage with that version"
            )
        changes = compare_state_inputs(saved["inputs"], self.inputs, self.name)
        if changes:
            raise ConfigError(
                f"{folder}: stage {self.name} stopped here after step {saved['step']} with other inputs; undo the "
                "change to resume it, or discard the state with --restart, which starts the stage again:"
                + "".join(f"\n  {change}" for change in changes)
            )
        if saved["num_ranks"] != self.num_ranks:
            raise ConfigError(
                f"{folder}: is the state of {saved['num_ranks']} ranks, but this run has {self.num_ranks}; "
                "start as many, or discard the state with --restart, which starts the stage again"
            )

    def resume(self, engine: Engine, average: WeightAverage | None = None) -> Progress:
        """Load the newest state, if there is one, and return its progress. A collective. Errors as `find_newest`."""
        found = run_on_first_rank(engine.process, self.find_newest)  # other ranks may see a shared folder late
        if found is None:
            return Progress()
        folder, progress = found
        engine.load_state(folder)
        if average is not None:
            average.load(folder / _AVERAGE)
        return progress

    def save(self, engine: Engine, progress: Progress, *, average: WeightAverage | None = None, keep: int = 1) -> None:
        """Save a state atomically, and delete all but the newest `keep`. A collective.

        WriteError on the ranks that see a full disk; older states are then kept.
        """
        folder = self.folder / f"step-{progress.step:08d}"
        new = folder.with_name(f"{_NEW}{folder.name}")
        try:
            with explain_write_errors(new):
                self._write(engine, progress, average, folder, new)
        except WriteError:
            shutil.rmtree(new, ignore_errors=True)  # the next attempt may need its space
            raise
        if engine.process.is_first:
            for older in sorted(self.folder.glob("step-*"))[:-keep]:
                shutil.rmtree(older, ignore_errors=True)

    def _write(
        self, engine: Engine, progress: Progress, average: WeightAverage | None, folder: Path, new: Path
    ) -> None:
        if engine.process.is_first:
            for stale in (folder, *self.folder.glob(f"{_NEW}*")):  # also remains of a kill or a full disk
                shutil.rmtree(stale, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        engine.save_state(new)
        engine.barrier()
        if engine.process.is_first:
            if average is not None:
                average.save(new / _AVERAGE)
            document = {
                "step": progress.step, "num_ranks": self.num_ranks, "notes": progress.notes, "inputs": self.inputs,
            }  # fmt: skip
            write_json(new / _MARKER, document)
            new.rename(folder)

    def clear(self) -> None:
        """Delete all states, after the stage has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.keys() >= _FIELDS else None
