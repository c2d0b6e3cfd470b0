"""The losses that the progress bar shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from student_train.config import StageSection
from student_train.training.deepspeed_engine import Process, StepUpdate
from student_train.training.journal import Journal


class Terminal:
    """A stream that keeps what is written and claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_losses_of_the_current_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    stage = StageSection(init="student", output=str(tmp_path), steps=20, log_every=10)
    process = Process(rank=0, num_ranks=1, device=torch.device("cpu"))
    update = StepUpdate(applied=True, grad_norm=1.0, loss_scale=None)
    with Journal(stage, "kd", num_steps=20, resumed_at=0, process=process) as journal:
        journal.count_step(8, 8, {"loss": 9.0})
        journal.write(1, {"loss": 9.0}, {}, lr=1e-3, update=update, memory_bytes=2**30)
        for step in range(2, 6):
            journal.count_step(8, 8, {"loss": float(step)})
    last = terminal.text.rpartition("\r")[2]
    assert "5/20" in last
    assert "loss=5.000" in last
    assert "tokens/s, 1.0 GiB" in last
