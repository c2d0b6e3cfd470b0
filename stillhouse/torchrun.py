"""Starts student_train/main.py as a person would by hand: under torchrun, or plainly for one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import student_train
from storage.processes.search_path import make_module_command
from student_train.config import StageSection

MAIN = Path(student_train.__file__).with_name("main.py")
_SHUTDOWN_S = 300  # of ranks that save their state after SIGTERM


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

    `flags`: of `training_flags`. One process needs no launcher: without it a start is seconds shorter.
    """
    launcher = (*make_module_command("student_train.launcher"), "--standalone", f"--nproc_per_node={num_processes}")
    options = (*flags, *(("--evaluate",) if evaluate else ()))
    script = (str(MAIN), str(config), "--stage", stage, *options, *overrides)
    return (*(launcher if num_processes > 1 else (sys.executable,)), *script)


def check_start(stage: StageSection, name: str, cache_path: str, *, splits: tuple[str, ...] | None) -> None:
    """What a rank would refuse before its first step is refused here, seconds earlier and without torchrun's traceback.

    `splits` of an evaluation to come. Of a student that is composed its parts are checked, where it is not there yet;
    whether the whole fits the caches is left to the ranks.
    """
    from student_train.models.compose import check_parts
    from student_train.training.stage_data import open_mixture, prepare, samples_of_any
    from student_train.training.trainer import resolved

    stage = resolved(stage, name)
    if stage.compose is None:
        data = prepare(stage, cache_path).data
    else:
        if not Path(stage.init).is_dir():
            check_parts(stage.compose, f"stages.{name}")
        data = open_mixture(stage, cache_path)
    if splits is not None:
        samples_of_any([source.cache for source in data.sources], splits)


def training_flags(*, again: bool = False, restart: bool = False, if_changed: bool = True) -> tuple[str, ...]:
    """How a training treats what it finds. `if_changed`: a finished stage of other inputs is trained anew."""
    flags = {"--again": again, "--again-if-changed": if_changed and not again, "--restart": restart}
    return tuple(flag for flag, is_given in flags.items() if is_given)


def num_ranks(wanted: int) -> int:
    """`wanted`, or the number of this machine's GPUs if it has some but fewer: two ranks share no GPU.

    The loss does not depend on the number of ranks; see student_train/data/batch_schedule.py.
    """
    import torch

    gpus = torch.cuda.device_count()
    return min(wanted, gpus) if gpus else wanted


def training_environment(num_threads: int) -> dict[str, str]:
    """This process's environment, each rank held to `num_threads` threads of arithmetic.

    torchrun kills ranks that take longer to save their state than it is told, by default 30 s.
    """
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, num_threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }
