"""Where an unfinished stage stands: saved now and then, and when it is asked to stop, so that the same command goes on.

    <output>/state/step-00000120/   what DeepSpeed keeps of weights that train and of the optimizer, by rank
    <output>/state/step-00000120/average.safetensors   with `ema`
    <output>/state/step-00000120/state.json   written last: step, inputs, what the loop remembers

The order of samples, the learning rate and the random numbers of a step are functions of (seed, step, rank), so
this is all there is to a stage's state, and a resumed run equals an undisturbed one to the bit. DeepSpeed's
files are pickles: they are the run's own and are read back by the run alone; a finished stage deletes them, and so
does `--restart`. A state of other inputs is refused, never deleted.
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
from student_train.training.deepspeed_engine import Engine, from_first
from student_train.training.ema import WeightAverage
from student_train.training.stage_inputs import changes_of_state

_MARKER = "state.json"
_NEW = "new-"  # begins the name of a state that is being written
_FIELDS = {"step", "num_ranks", "notes"}
_AVERAGE = "average.safetensors"


class StageStopped(Interrupted):
    """A stage that was asked to stop, and whose state is saved."""


@dataclass(frozen=True)
class Progress:
    """Where a stage stands."""

    step: int = 0  # steps that are done
    notes: Mapping[str, Any] = field(default_factory=dict)  # what the loop remembers of them, a JSON object


@dataclass(frozen=True)
class StageState:
    """The saved states of one stage's output folder."""

    folder: Path
    name: str  # of the stage
    inputs: Mapping[str, Any]  # all that decides what the stage computes: see stage_inputs.py
    num_ranks: int

    @staticmethod
    def of(output: Path, name: str, inputs: Mapping[str, Any], *, num_ranks: int) -> StageState:
        """Of the stage that trains in the folder `output`."""
        return StageState(output / "state", name, inputs, num_ranks)

    def newest(self) -> tuple[Path, Progress] | None:
        """The newest whole state with its folder; None if there is none.

        Errors: ConfigError, with each field and both values, if it was made from other inputs or by another number
        of ranks.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            saved = _read(folder / _MARKER)
            if saved is not None:
                self._check(folder, saved)
                return folder, Progress(int(saved["step"]), saved["notes"])
        return None

    def _check(self, folder: Path, saved: Mapping[str, Any]) -> None:
        if saved.get("inputs") is None:
            raise ConfigError(
                f"{folder}: this state does not say from which settings it was made, because an earlier version saved "
                "it; --restart gives it up and begins the stage anew, or finish the stage with that version"
            )
        changes = changes_of_state(saved["inputs"], self.inputs, self.name)
        if changes:
            raise ConfigError(
                f"{folder}: stage {self.name} stopped here after step {saved['step']} with other inputs; undo the "
                "change to resume it, or give it up with --restart, which begins the stage anew:"
                + "".join(f"\n  {change}" for change in changes)
            )
        if saved["num_ranks"] != self.num_ranks:
            raise ConfigError(
                f"{folder}: is the state of {saved['num_ranks']} ranks, this run has {self.num_ranks}; "
                "start as many, or give it up with --restart, which begins the stage anew"
            )

    def resume(self, engine: Engine, average: WeightAverage | None = None) -> Progress:
        """Load the newest state, if there is one; returns where it stands. A collective. Errors: those of `newest`."""
        found = from_first(engine.process, self.newest)  # other ranks may see a shared folder late
        if found is None:
            return Progress()
        folder, progress = found
        engine.load_state(folder)
        if average is not None:
            average.load(folder / _AVERAGE)
        return progress

    def save(self, engine: Engine, progress: Progress, *, average: WeightAverage | None = None, keep: int = 1) -> None:
        """Save, and delete all but the newest `keep`. A collective; whole or not there at all.

        WriteError, on the ranks that have seen it, and older states stay: a full disk.
        """
        folder = self.folder / f"step-{progress.step:08d}"
        new = folder.with_name(f"{_NEW}{folder.name}")
        try:
            with explain_write_errors(new):
                self._write(engine, progress, average, folder, new)
        except WriteError:
            shutil.rmtree(new, ignore_errors=True)  # its room may be what the next attempt needs
            raise
        if engine.process.is_first:
            for older in sorted(self.folder.glob("step-*"))[:-keep]:
                shutil.rmtree(older, ignore_errors=True)

    def _write(
        self, engine: Engine, progress: Progress, average: WeightAverage | None, folder: Path, new: Path
    ) -> None:
        if engine.process.is_first:
            for stale in (folder, *self.folder.glob(f"{_NEW}*")):  # and what a kill or a full disk left
                shutil.rmtree(stale, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        engine.save_state(new)
        engine.barrier()
        if engine.process.is_first:
            if average is not None:
                average.save(new / _AVERAGE)
            said = {
                "step": progress.step, "num_ranks": self.num_ranks, "notes": progress.notes, "inputs": self.inputs,
            }  # fmt: skip
            write_json(new / _MARKER, said)
            new.rename(folder)

    def clear(self) -> None:
        """Delete all states: the stage is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.keys() >= _FIELDS else None
