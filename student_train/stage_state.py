"""Where an unfinished stage stands: saved now and then, and when it is asked to stop, so that the same command goes on.

    <output>/state/step-00000120/   what DeepSpeed keeps of weights that train and of the optimizer, by rank
    <output>/state/step-00000120/state.json   written last: step and fingerprint

The order of samples, the learning rate and the random numbers of a step are functions of (seed, step, rank), so
this is all there is to a stage's state, and a resumed run equals an undisturbed one to the bit. DeepSpeed's
files are pickles: they are the run's own and are read back by the run alone; a finished stage deletes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from storage.errors import ConfigError, StillhouseError
from student_train.config import StageSection
from student_train.documents import write_json
from student_train.engine import Engine

_MARKER = "state.json"
_log = logging.getLogger(__name__)
_NOT_OF_THE_RUN = {"save_every", "keep_states", "log_every", "memory_mb", "num_processes", "output"}  # may differ


class StoppedError(StillhouseError):
    """A stage that was asked to stop and can be continued by the same command."""

    stopped = True


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

    def resume(self, engine: Engine) -> int:
        """Load the newest state, if there is one of this run; returns the number of steps done. A collective.

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
            return int(said["step"])
        engine.barrier()  # every rank has seen that there is none
        if engine.process.is_first:
            if others := sorted(path.name for path in self.folder.glob("step-*")):
                _log.warning(
                    "%s: %s is of another configuration or cache, and is deleted: the stage begins anew",
                    self.folder,
                    others[-1],
                )
            self.clear()
        return 0

    def save(self, engine: Engine, step: int, *, keep: int) -> None:
        """Save after `step` steps, and delete all but the newest `keep`. A collective; whole or not there at all."""
        folder = self.folder / f"step-{step:08d}"
        new = folder.with_name(f"new-{folder.name}")
        if engine.process.is_first:
            for stale in (new, folder):
                shutil.rmtree(stale, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        engine.save_state(new)
        engine.barrier()
        if engine.process.is_first:
            said = {"step": step, "fingerprint": self.fingerprint, "num_ranks": self.num_ranks}
            write_json(new / _MARKER, said)
            new.rename(folder)
            for older in sorted(self.folder.glob("step-*"))[:-keep]:
                shutil.rmtree(older, ignore_errors=True)

    def clear(self) -> None:
        """Delete all states: the stage is finished, or another one begins here."""
        shutil.rmtree(self.folder, ignore_errors=True)


class StopRequest:
    """Whether SIGTERM has come since this began, on any rank. Use as a context manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._here = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def heard(self) -> bool:
        """The same answer on every rank; a collective."""
        return self._engine.max_over_ranks({"stop": float(self._here)})["stop"] > 0

    def _hear(self, _signal: int, _frame: FrameType | None) -> None:
        self._here = True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and {"step", "fingerprint", "num_ranks"} <= said.keys() else None
