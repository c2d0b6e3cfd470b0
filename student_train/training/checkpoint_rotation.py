"""The checkpoints of a stage: the one at its end, the last ones on the way, and the best by a held-out loss.

    <output>/                            the last step's
    <output>/checkpoints/step-00000500/  on the way
    <output>/checkpoints/best/           of the smallest held-out loss

Each is whole: a folder that transformers loads, written beside its place and renamed.
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
from student_train.models.checkpoint import put_back, save_checkpoint
from student_train.training.deepspeed_engine import Engine
from student_train.training.ema import WeightAverage


@dataclass(frozen=True)
class Best:
    """The smallest held-out loss so far."""

    step: int  # counted from 1
    metric: str
    value: float


@dataclass(frozen=True, eq=False)
class KeptCheckpoints:
    """Writes checkpoints of a model that trains. All methods but `begin` are collectives."""

    engine: Engine
    model: Any
    stage: StageSection  # resolved
    average: WeightAverage | None = None
    pixels: PixelSettings | None = None  # that it trains on; None: its caches hold no images
    template_arguments: Mapping[str, Any] | None = None  # of its cache's conversations; None: those of stage.init

    @property
    def _folder(self) -> Path:
        return Path(self.stage.output) / "checkpoints"

    def begin(self, step: int) -> None:
        """Delete what a run that now goes on after `step` steps has not made yet, and what a kill left half written."""
        if not self.engine.process.is_first:
            return
        if step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        put_back(self._folder / "best")  # of which there is no other copy
        for folder in self._folder.glob("*"):
            if ".tmp-" in folder.name or (folder.name.startswith("step-") and folder.name > _name(step)):
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Make the output folder a checkpoint."""
        self._write(Path(self.stage.output))

    def keep(self, step: int, held_out: Mapping[str, float], best: Best | None, *, last: bool) -> Best | None:
        """After a step, counted from 1: keep its checkpoint, and delete older ones; returns the best of now.

        `held_out`: its losses; empty if there are none. `last`: the stage ends here, and has its own checkpoint.
        """
        section = self.stage.checkpoints
        assert section is not None
        value = held_out.get(section.metric, math.nan)
        if math.isfinite(value) and (best is None or value < best.value):
            best = Best(step, section.metric, value)
            self._write(self._folder / "best")
        if section.keep_last and not last:
            self._write(self._folder / _name(step))
            if self.engine.process.is_first:
                for older in sorted(self._folder.glob("step-*"))[: -section.keep_last]:
                    shutil.rmtree(older, ignore_errors=True)
        return best

    def _write(self, folder: Path) -> None:
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            weights = self.engine.state_dict(self.model)
            if not self.engine.process.is_first:
                return
            section, beside = self.stage.lora, None
            if section is not None:
                adapters, base = weights, self.stage.init
                beside = partial(_save_adapter, adapters, section, base)
                weights = lora.merged(weights, section)
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


def _name(step: int) -> str:
    return f"step-{step:08d}"
