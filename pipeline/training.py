"""Starts student_train/main.py under torchrun, as a person would by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import student_train

MAIN = Path(student_train.__file__).with_name("main.py")


def torchrun_command(
    config: Path, stage: str, overrides: Sequence[str], *, num_processes: int, evaluate: bool
) -> tuple[str, ...]:
    """The argv of `torchrun --nproc_per_node N student_train/main.py FILE --stage NAME …`."""
    options = ["--evaluate"] if evaluate else []
    return (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_processes}",
        str(MAIN),
        str(config),
        "--stage",
        stage,
        *options,
        *overrides,
    )


def training_environment(num_threads: int) -> dict[str, str]:
    """This process's environment, each rank held to `num_threads` threads of arithmetic."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, num_threads)), "TOKENIZERS_PARALLELISM": "false"}
