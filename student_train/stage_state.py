"""Where an unfinished stage stands: saved now and then, and when it is asked to stop, so that the same command goes on.

    <output>/state/step-00000120/   what DeepSpeed keeps of weights that train and of the optimizer, by rank
    <output>/state/step-00000120/average.safetensors   with `ema`
    <output>/state/step-00000120/state.json   written last: step, fingerprint, what the loop remembers

The order of samples, the learning rate and the random numbers of a step are functions of (seed, step, rank), so
this is all there is to a stage's state, and a resumed run equals an undisturbed one to the bit. DeepSpeed's
files are pickles: they are the run's own and are read back by the run alone; a finished stage deletes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.disk import explain_write_errors
from storage.errors import ConfigError, WriteError
from storage.stop_signals import Interrupted
from student_train.config import StageSection
from student_train.documents import write_json
from student_train.engine import Engine
from student_train.weight_average import WeightAverage

_MARKER = "state.json"
_NEW = "new-"  # begins the name of a state that is being written
_FIELDS = {"step", "fingerprint", "num_ranks", "notes"}
_AVERAGE = "average.safetensors"
_log = logging.getLogger(__name__)
_NOT_OF_THE_RUN = {"save_every", "keep_states", "log_every", "memory_mb", "num_processes", "output"}
_NOT_OF_THE_RUN |= {"track", "explosion_factor", "checkpoints"}  # may differ


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
    fingerprint: str  # of all that decides what the stage computes
    num_ranks: int

    @staticmethod
    def of(stage: StageSection, data: str, *, num_ranks: int) -> StageState:
        """Of a resolved stage over data of that fingerprint."""
        settings = {k: v for k, v in stage.model_dump(mode="json").items() if k not in _NOT_OF_THE_RUN}
        text = json.dumps([settings, data], sort_keys=True)
        return StageState(Path(stage.output) / "state", hashlib.sha256(text.encode()).hexdigest(), num_ranks)

    def resume(self, engine: Engine, average: WeightAverage | None = None) -> Progress:
        """Load the newest state, if there is one of this run; returns where it stands. A collective.

        States of another configuration, whose checkpoint this run replaces, are deleted with a warning. Errors:
        ConfigError for another number of ranks.
        """
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            said = _read(folder / _MARKER)
            if said is None or said["fingerprint"] != self.fingerprint:
                continue
            if said["num_ranks"] != self.num_ranks:
                raise ConfigError(
                    f"{folder}: is the state of {said['num_ranks']} ranks, this run has {self.num_ranks}; "
                    f"start as many, or delete {self.folder} to begin anew"
                )
            engine.load_state(folder)
            if average is not None:
                average.load(folder / _AVERAGE)
            return Progress(int(said["step"]), said["notes"])
        engine.barrier()  # every rank has seen that there is none
        if engine.process.is_first:
            if others := sorted(path.name for path in self.folder.glob("step-*")):
                _log.warning(
                    "%s: %s is of another configuration, cache or init, and is deleted: the stage begins anew",
                    self.folder,
                    others[-1],
                )
            self.clear()
        return Progress()

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
                "step": progress.step, "fingerprint": self.fingerprint, "num_ranks": self.num_ranks,
                "notes": progress.notes,
            }  # fmt: skip
            write_json(new / _MARKER, said)
            new.rename(folder)

    def clear(self) -> None:
        """Delete all states: the stage is finished, or another one begins here."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.keys() >= _FIELDS else None
