"""The checkpoints of a stage: the final one, the latest intermediate ones, and the best by a held-out loss.

    <output>/                            of the last step
    <output>/checkpoints/step-00000500/  intermediate
    <output>/checkpoints/best/           of the smallest held-out loss

Each is a complete folder that transformers loads, written to a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage.images.settings import PixelSettings
from student_train.config import StageSection
from student_train.models import lora
from student_train.models.checkpoint import recover_checkpoint, save_checkpoint
from student_train.training.deepspeed_engine import Engine
from student_train.training.ema import WeightAverage


@dataclass(frozen=True)
class BestCheckpoint:
    """The step and value of the smallest held-out loss so far."""

    step: int  # counted from 1
    metric: str
    value: float


@dataclass(frozen=True, eq=False)
class CheckpointRotation:
    """Writes and deletes a stage's checkpoints. All methods but `delete_stale` are collectives."""

    engine: Engine
    model: Any
    stage: StageSection  # resolved
    average: WeightAverage | None = None
    pixels: PixelSettings | None = None  # that the stage trains on; None: its caches hold no images
    template_arguments: Mapping[str, Any] | None = None  # of the cache's conversations; None: those of stage.init

    @property
    def _folder(self) -> Path:
        return Path(self.stage.output) / "checkpoints"

    def delete_stale(self, step: int) -> None:
        """Delete checkpoints after step `step`, from which the run resumes, and those that a kill left incomplete."""
        if not self.engine.process.is_first:
            return
        if step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        recover_checkpoint(self._folder / "best")  # there is no other copy of it
        for folder in self._folder.glob("*"):
            if ".tmp-" in folder.name or (folder.name.startswith("step-") and folder.name > _format_step(step)):
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Write the final checkpoint into the output folder."""
        self._write(Path(self.stage.output))

    def keep(
        self, step: int, held_out: Mapping[str, float], best: BestCheckpoint | None, *, last: bool
    ) -> BestCheckpoint | None:
        """Write the checkpoint of a step, counted from 1, and delete older ones; return the best one so far.

        `held_out`: the step's held-out losses; may be empty. `last`: the stage ends here, with its final checkpoint.
        """
        section = self.stage.checkpoints
        assert section is not None
        value = held_out.get(section.metric, math.nan)
        if math.isfinite(value) and (best is None or value < best.value):
            best = BestCheckpoint(step, section.metric, value)
            self._write(self._folder / "best")
        if section.keep_last and not last:
            self._write(self._folder / _format_step(step))
            if self.engine.process.is_first:
                for older in sorted(self._folder.glob("step-*"))[: -section.keep_last]:
                    shutil.rmtree(older, ignore_errors=True)
        return best

    def _write(self, folder: Path) -> None:
        with contextlib.nullcontext() if self.average is None else self.average.swapped_in():
            weights = self.engine.state_dict(self.model)
            if not self.engine.process.is_first:
                return
            section, beside = self.stage.lora, None
            if section is not None:
                adapters, base = weights, self.stage.init
                beside = partial(_save_adapter, adapters, section, base)
                weights = lora.merge_adapters(weights, section)
            save_checkpoint(
                self.model,
                folder,
                self.stage.init,
                state_dict=weights,
                pixels=self.pixels,
                template_arguments=self.template_arguments,
                beside=beside,
            )


def _save_adapter(weights: Mapping[str, Any], section: Any, base: str, folder: Path) -> None:
    lora.save_adapter(weights, section, base, folder / lora.FOLDER)


def _format_step(step: int) -> str:
    return f"step-{step:08d}"
