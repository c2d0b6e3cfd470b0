"""Prints the relative error of a bf16 gradient accumulated over many micro-batches, one JSON line a ZeRO stage.

Runs in a process of its own, since importing DeepSpeed changes the process.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from student_train.config import StageSection
from student_train.models.parameter_groups import ParameterGroup
from student_train.training.deepspeed_engine import Engine, detect_process

SIZE = 48


class Quadratic(nn.Module):
    """Half the squared distance of a linear map's output from 0, divided by the number of micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))

    def forward(self, rows: Tensor, share: float) -> Tensor:
        return 0.5 * share * (rows.to(self.weight.dtype) @ self.weight).float().square().sum()


def relative_error(zero_stage: Literal[1, 2, 3], num_micro: int, log_path: Path) -> float:
    """Return the accumulated gradient's relative error (Frobenius norm) against float64 on the same bf16 weights."""
    stage = StageSection(init="none", zero_stage=zero_stage, precision="bf16", steps=1)
    module = Quadratic()
    weight = module.weight.detach().to(torch.bfloat16).double()
    group = ParameterGroup(parameters=[module.weight], weight_decay=0.0, lr_factor=1.0)
    engine = Engine(module, [group], stage, detect_process(), num_micro=num_micro, log_path=log_path)
    draw = torch.Generator().manual_seed(1)
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for micro in range(num_micro):
        rows = 1 + torch.randn(4, SIZE, generator=draw).to(torch.bfloat16)
        engine.backward(engine.forward(rows, 1 / num_micro))
        expected += rows.double().T @ (rows.double() @ weight) / num_micro
        if micro < num_micro - 1:
            engine.step(1e-3)
    (parameter,) = engine._engine.module.parameters()
    gradient = importlib.import_module("deepspeed.utils").safe_get_full_grad(parameter)
    engine.step(1e-3)
    engine.close()
    return float((gradient.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for zero_stage in (1, 2, 3):
            errors = {num: relative_error(zero_stage, num, Path(folder) / "log") for num in (1, int(sys.argv[1]))}
            sys.stdout.write(json.dumps({"zero_stage": zero_stage, "errors": list(errors.values())}) + "\n")
