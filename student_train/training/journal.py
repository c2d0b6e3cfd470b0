"""Reports a stage's steps: metrics.jsonl, trackers, a progress bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from student_train.config import StageSection
from student_train.training.deepspeed_engine import Process, StepUpdate
from student_train.training.metrics_log import MetricsLog
from student_train.training.trackers import Trackers


class Journal:
    """Reports steps on the first rank; does nothing visible on the others. Use as a context manager."""

    def __init__(self, stage: StageSection, name: str, *, num_steps: int, resumed_at: int, process: Process) -> None:
        """`stage`: resolved. `resumed_at`: the number of steps that are already done."""
        output, is_first = Path(stage.output), process.is_first
        self._log = MetricsLog(output / "metrics.jsonl" if is_first else None, resumed_at=resumed_at)
        self._tracking = Trackers(
            stage.track if is_first else (), output, title=f"{name}-{stage.seed}",
            settings=stage.model_dump(mode="json"), done=self._log.kept,
        )  # fmt: skip
        self._bar = tqdm(
            total=num_steps, initial=resumed_at, desc=name, unit="step", disable=not is_first,
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        self._open = contextlib.ExitStack()
        self._global_batch = stage.global_batch
        self._rates: tuple[str, ...] = ()  # of the last line of metrics.jsonl
        self._start_counting()

    def __enter__(self) -> Self:
        for each in (self._bar, self._log, self._tracking):
            self._open.enter_context(each)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def count_step(self, num_tokens: float, num_positions: float, losses: Mapping[str, float]) -> None:
        """Count a step with its tokens over all ranks, and positions with padding; show its losses in the bar."""
        self._num_steps, self._num_tokens = self._num_steps + 1, self._num_tokens + num_tokens
        self._num_positions += num_positions
        shown = [f"{name}={value:.3f}" for name, value in losses.items()]
        self._bar.set_postfix_str(", ".join([*shown, *self._rates]), refresh=False)
        self._bar.update()

    def write(
        self,
        step: int,
        losses: Mapping[str, float],
        held_out: Mapping[str, float],
        *,
        lr: float,
        update: StepUpdate,
        memory_bytes: int,
    ) -> None:
        """Log a step, counted from 1. Rates are over the steps since the last call."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        line = {
            "step": step,
            **losses,
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "lr": lr,
            "grad_norm": update.grad_norm if update.applied else None,
            **({} if update.loss_scale is None else {"loss_scale": update.loss_scale}),
            "samples_per_s": self._num_steps * self._global_batch / seconds,
            "tokens_per_s": self._num_tokens / seconds,
            "padding_fraction": 1 - self._num_tokens / self._num_positions,
            "memory_bytes": memory_bytes,  # peak of any rank so far
        }
        self._log.write(line)
        self._tracking.write(line)
        self._rates = f"{line['tokens_per_s']:.0f} tokens/s", f"{memory_bytes / 2**30:.1f} GiB"
        self._start_counting()

    def _start_counting(self) -> None:
        self._since, self._num_steps, self._num_tokens, self._num_positions = time.monotonic(), 0, 0.0, 0.0
