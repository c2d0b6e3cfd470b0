"""Trains stages in turn, each in a fork of this process, which imports what training needs only once.

`python -m student_train.training_server` is started for the runs of an ablation grid that use no GPU (before a fork,
CUDA must not be asked for anything). The requests come through stdin, see storage/processes/forking_server.py; each is
a call of student_train/main.py.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence

from storage.processes.forking_server import serve
from student_train.command import main

_IMPORTED = (
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "transformers.models.llava.modeling_llava",  # what every architecture imports, too
    "student_train.models.compose",
    "student_train.models.prune",
    "student_train.training.layer_change",
    "student_train.training.trainer",
    "student_train.training.stage_result",
    "student_train.evaluation.model_evaluation",
)


def train(arguments: Sequence[str]) -> int:
    """Do what `python student_train/main.py ARGUMENTS` does; return the exit code."""
    return main(arguments, started=time.monotonic())


def import_all() -> None:
    """Import the modules that every stage needs."""
    for name in _IMPORTED:
        importlib.import_module(name)
    from student_train.training.deepspeed_engine import detect_process, import_deepspeed

    import_deepspeed(detect_process())


if __name__ == "__main__":
    sys.exit(serve(train, prepare=import_all))
