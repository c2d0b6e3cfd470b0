"""The command line of student_train/main.py: reads sections, trains, evaluates, speaks to a person."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.backends.disk import report_full_disk
from storage.backends.lock import Lock
from storage.config import CacheSection
from storage.config_loader import NamedSections, Sections, read_sections
from storage.errors import ConfigError, StillhouseError
from storage.processes.stop_signals import describe_interruption, get_exit_code, interruptible
from storage.processes.supervisor import die_with_parent
from student_train.config import EvaluationSection, StageSection
from student_train.training.stage_request import Request

if TYPE_CHECKING:  # which imports torch
    from student_train.training.stage_result import Work

SCHEMAS = {"cache": CacheSection, "stages": NamedSections(StageSection), "evaluation": EvaluationSection}


def main(arguments: Sequence[str], *, started: float) -> int:
    """Train the stage that the command line names; returns the exit code. `started`: of time.monotonic().

    SIGTERM and SIGINT save a state and end it with 143 or 130; before the first step there is nothing to save.
    """
    parser = argparse.ArgumentParser(prog="student_train/main.py", description="Train one stage.")
    parser.add_argument("file", help="pipeline.yaml")
    parser.add_argument("--stage", required=True, help="a name below `stages:`")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the checkpoint afterwards")
    parser.add_argument("--again", action="store_true", help="train a finished stage anew, and replace its result then")
    parser.add_argument("--again-if-changed", action="store_true", help="the same, if it was made from other inputs")
    parser.add_argument("--restart", action="store_true", help="give up the state of an unfinished training")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from other ranks
    is_first = os.environ.get("RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this rank, which must not train on without it
        die_with_parent()
    try:
        with interruptible():
            sections = read_sections(options.file, SCHEMAS, options.overrides)
            train(sections, options.stage, _request(options), evaluate=options.evaluate, started=started)
    except KeyboardInterrupt as stop:
        if is_first:
            sys.stderr.write(f"{describe_interruption(stop)}\n")
        return get_exit_code(stop)
    except StillhouseError as error:
        if is_first or getattr(error, "of_this_rank", False):
            sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except Exception as error:
        return report_full_disk(error)
    return 0


def _request(options: argparse.Namespace) -> Request:
    if options.again:
        return Request("always", options.restart)
    return Request("if_changed" if options.again_if_changed else "never", options.restart)


def train(sections: Sections, name: str, request: Request, *, evaluate: bool, started: float) -> None:
    """Train the stage of that name unless it is finished; evaluate it on the first rank. Errors: StillhouseError."""
    stages = sections["stages"]
    if name not in stages:
        known = ", ".join(stages) or "no stages"
        raise ConfigError(f"{sections.path}: there is no stage {name!r}; the file has {known}")
    # torch and transformers: seconds, which a misspelt name should not cost
    from student_train.models.compose import ensure_composed
    from student_train.training import trainer
    from student_train.training.deepspeed_engine import from_first, this_process
    from student_train.training.stage_data import fitting_checkpoint, prepare, samples_of_any
    from student_train.training.stage_inputs import stage_inputs
    from student_train.training.stage_result import decide, lock_stage, put_in_place

    stage = trainer.resolved(stages[name], name)
    cache_path, evaluation = sections["cache"].path, sections["evaluation"]
    process = this_process()
    with contextlib.ExitStack() as held:
        locks: list[Lock] = []  # the first rank's

        def fits(folder: Path) -> None:
            fitting_checkpoint(stage.model_copy(update={"init": str(folder)}), cache_path)

        def begin() -> None:
            locks.append(held.enter_context(lock_stage(stage, name)))
            if stage.compose is not None:
                replaces = request.again != "never" or request.restart
                ensure_composed(stage.compose, stage.init, seed=stage.seed, replaces=replaces, check=fits)

        from_first(process, begin)
        material = prepare(stage, cache_path)
        if evaluate:  # hours of training should not end at a misspelt split
            samples_of_any([source.cache for source in material.data.sources], evaluation.splits)
        aside = trainer.held_out_stage(stage, material.data)
        held_out = None if aside is None else prepare(aside, cache_path)

        def begin_work() -> tuple[Work, dict[str, Any]]:
            inputs = stage_inputs(stage, material)
            return decide(stage, name, inputs, request, num_ranks=process.num_ranks), inputs

        work, inputs = from_first(process, begin_work)
        if work.trains:
            moved = stage.model_copy(update={"output": str(work.folder)})
            trainer.train(moved, name, material, process, inputs=inputs, started=started, held_out=held_out)
        elif process.is_first:
            sys.stdout.write(f"stage {name}: finished already, and nothing has changed: {work.folder}\n")
        if process.is_first:
            if evaluate and (work.trains or not _is_evaluated(work.folder, evaluation, request)):
                from student_train.evaluation.evaluate import evaluate_model

                evaluate_model(work.folder, stage.sources(cache_path), evaluation)
            for lock in locks:
                lock.check()
            put_in_place(work, stage)


def _is_evaluated(folder: Path, section: EvaluationSection, request: Request) -> bool:
    """Whether a finished stage has its evaluation.json. A grid asks for it when a cache has changed, so it gets one."""
    if request.again != "never":
        return False
    try:
        document = json.loads((folder / "evaluation.json").read_bytes())
    except (OSError, ValueError):
        return False
    return document.get("settings") == section.model_dump(mode="json")
