"""Builds the command that trains a stage: torchrun with student_train/main.py, or plain Python for one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import student_train
from storage.processes.search_path import make_module_command
from student_train.config import StageSection
from student_train.training.init_making import check_init_making
from student_train.training.stage_data import check_evaluation_splits, open_mixture, prepare_stage_data
from student_train.training.trainer import resolve_stage

MAIN = Path(student_train.__file__).with_name("main.py")
TRAINING_SERVER = "student_train.training_server"
_SHUTDOWN_S = 300  # that ranks have to save their state after SIGTERM; torchrun's default is 30


def make_training_arguments(
    config: Path, stage: str, overrides: Sequence[str], *, evaluate: bool, flags: Sequence[str] = ()
) -> tuple[str, ...]:
    """The arguments of student_train/main.py. `flags` come from make_training_flags."""
    return (str(config), "--stage", stage, *flags, *(("--evaluate",) if evaluate else ()), *overrides)


def make_training_command(arguments: Sequence[str], *, num_processes: int) -> tuple[str, ...]:
    """The argv of `torchrun --nproc_per_node N student_train/main.py ARGUMENTS`; see make_training_arguments.

    One process starts without torchrun, which saves seconds.
    """
    launcher = (*make_module_command("student_train.launcher"), "--standalone", f"--nproc_per_node={num_processes}")
    return (*(launcher if num_processes > 1 else (sys.executable,)), str(MAIN), *arguments)


def check_training_start(stage: StageSection, name: str, cache_path: str, *, splits: tuple[str, ...] | None) -> None:
    """Refuses what a rank would refuse before its first step: seconds earlier, and without torchrun's traceback.

    `splits` are those of the evaluation after the training, None without one. Of a composed or pruned student that
    does not exist yet, what it is made from is checked; the ranks check whether the whole fits the caches.
    """
    stage = resolve_stage(stage, name)
    if stage.compose is None and stage.prune is None:
        data = prepare_stage_data(stage, cache_path).mixture
    else:
        if not Path(stage.init).is_dir():
            check_init_making(stage, f"stages.{name}")
        data = open_mixture(stage, cache_path)
    if splits is not None:
        check_evaluation_splits(stage, data, splits)


def make_training_flags(*, again: bool = False, restart: bool = False, if_changed: bool = True) -> tuple[str, ...]:
    """Options of student_train/main.py. `if_changed`: a finished stage is trained again if its inputs changed."""
    flags = {"--again": again, "--again-if-changed": if_changed and not again, "--restart": restart}
    return tuple(flag for flag, is_given in flags.items() if is_given)


def count_ranks(wanted: int) -> int:
    """The number of ranks to start: `wanted`, or the number of GPUs if this machine has some but fewer.

    Two ranks cannot share a GPU. The loss does not depend on the number of ranks; see
    student_train/data/batch_schedule.py.
    """
    gpus = torch.cuda.device_count()
    return min(wanted, gpus) if gpus else wanted


def make_training_environment(num_threads: int) -> dict[str, str]:
    """This process's environment with `num_threads` OpenMP threads for each rank, and time to save a state."""
    return {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_S),
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, num_threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }
