"""Starts student_train/main.py as a person would by hand: under torchrun, or plainly for one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import student_train

MAIN = Path(student_train.__file__).with_name("main.py")


def training_command(
    config: Path,
    stage: str,
    overrides: Sequence[str],
    *,
    num_processes: int,
    evaluate: bool,
    flags: Sequence[str] = (),
) -> tuple[str, ...]:
    """The argv of `torchrun --nproc_per_node N student_train/main.py FILE --stage NAME …`.

    `flags`: of `training_flags`. One process needs no launcher: without it a start is seconds shorter, and exit code 2
    stays what it is.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}")
    options = (*flags, *(("--evaluate",) if evaluate else ()))
    script = (str(MAIN), str(config), "--stage", stage, *options, *overrides)
    return (sys.executable, *(launcher if num_processes > 1 else ()), *script)


def training_flags(*, again: bool = False, restart: bool = False, if_changed: bool = True) -> tuple[str, ...]:
    """How a training treats what it finds. `if_changed`: a finished stage of other inputs is trained anew."""
    flags = {"--again": again, "--again-if-changed": if_changed and not again, "--restart": restart}
    return tuple(flag for flag, is_given in flags.items() if is_given)


def num_ranks(wanted: int) -> int:
    """`wanted`, or the number of this machine's GPUs if it has some but fewer: two ranks share no GPU.

    The loss does not depend on the number of ranks; see student_train/loader.py.
    """
    import torch

    gpus = torch.cuda.device_count()
    return min(wanted, gpus) if gpus else wanted


def training_environment(num_threads: int) -> dict[str, str]:
    """This process's environment, each rank held to `num_threads` threads of arithmetic."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, num_threads)), "TOKENIZERS_PARALLELISM": "false"}
