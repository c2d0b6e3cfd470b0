"""The command line of student_train/main.py: reads the config, trains, evaluates, reports errors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.backends.lock import Lock
from storage.config import CacheSection
from storage.config_loader import NamedSections, Sections, read_sections
from storage.entry_point import run_command
from storage.errors import ConfigError
from storage.processes.supervisor import die_with_parent
from student_train.config import EvaluationSection, StageSection
from student_train.training.stage_request import StageRequest

if TYPE_CHECKING:  # which imports torch
    from student_train.training.stage_result import StageDecision

SCHEMAS = {"cache": CacheSection, "stages": NamedSections(StageSection), "evaluation": EvaluationSection}


def main(arguments: Sequence[str], *, started: float) -> int:
    """Train the stage that the command line names; return the exit code.

    `started`: time.monotonic() at the start of the process. SIGTERM and SIGINT save the training state
    (none before the first step) and give the exit codes 143 and 130.
    """
    parser = argparse.ArgumentParser(prog="student_train/main.py", description="Train one stage.")
    parser.add_argument("file", help="pipeline.yaml")
    parser.add_argument("--stage", required=True, help="a name below `stages:`")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the checkpoint afterwards")
    parser.add_argument("--again", action="store_true", help="retrain a finished stage, then replace its result")
    parser.add_argument("--again-if-changed", action="store_true", help="the same, but only if its inputs have changed")
    parser.add_argument("--restart", action="store_true", help="discard the state of an unfinished training")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the cores of other ranks
    is_first = os.environ.get("RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this rank, which must not train on without it
        die_with_parent()

    def run() -> None:
        sections = read_sections(options.file, SCHEMAS, options.overrides)
        train(sections, options.stage, _make_request(options), evaluate=options.evaluate, started=started)

    return run_command(run, is_shown=lambda error: is_first or getattr(error, "of_this_rank", False))


def _make_request(options: argparse.Namespace) -> StageRequest:
    if options.again:
        return StageRequest("always", options.restart)
    return StageRequest("if_changed" if options.again_if_changed else "never", options.restart)


def train(sections: Sections, name: str, request: StageRequest, *, evaluate: bool, started: float) -> None:
    """Train the stage `name` unless it is finished, then evaluate it on the first rank.

    Errors: StillhouseError.
    """
    stages = sections["stages"]
    if name not in stages:
        known = ", ".join(stages) or "no stages"
        raise ConfigError(f"{sections.path}: there is no stage {name!r}; the file has {known}")
    # These import torch and transformers, which takes seconds that a misspelt stage name should not cost.
    from student_train.models.compose import ensure_composed
    from student_train.models.prune import ensure_pruned
    from student_train.training import trainer
    from student_train.training.deepspeed_engine import detect_process, run_on_first_rank
    from student_train.training.layer_change import LayerChange
    from student_train.training.stage_data import check_evaluation_splits, prepare_stage_data, read_fitting_checkpoint
    from student_train.training.stage_inputs import collect_stage_inputs
    from student_train.training.stage_result import decide_stage, install_result, lock_stage

    stage = trainer.resolve_stage(stages[name], name)
    cache_path, evaluation = sections["cache"].path, sections["evaluation"]
    process = detect_process()
    with contextlib.ExitStack() as stack:
        locks: list[Lock] = []  # the first rank's

        def check_fits(folder: Path) -> None:
            read_fitting_checkpoint(stage.model_copy(update={"init": str(folder)}), cache_path)

        def lock_and_make_init() -> None:
            locks.append(stack.enter_context(lock_stage(stage, name)))
            replaces = request.again != "never" or request.restart
            if stage.compose is not None:
                ensure_composed(stage.compose, stage.init, seed=stage.seed, replaces=replaces, check=check_fits)
            if stage.prune is not None:
                measure = LayerChange(stage, stage.prune, cache_path)
                ensure_pruned(stage.prune, stage.init, measure=measure, replaces=replaces, check=check_fits)

        run_on_first_rank(process, lock_and_make_init)
        stage_data = prepare_stage_data(stage, cache_path)
        if evaluate:  # fails now, not after hours of training, if a split is misspelt
            check_evaluation_splits(stage, stage_data.mixture, evaluation.splits)
        held_out_stage = trainer.make_held_out_stage(stage, stage_data.mixture)
        held_out = None if held_out_stage is None else prepare_stage_data(held_out_stage, cache_path)

        def decide() -> tuple[StageDecision, dict[str, Any]]:
            inputs = collect_stage_inputs(stage, stage_data)
            return decide_stage(stage, name, inputs, request, num_ranks=process.num_ranks), inputs

        decision, inputs = run_on_first_rank(process, decide)
        if decision.trains:
            moved = stage.model_copy(update={"output": str(decision.folder)})
            trainer.train(moved, name, stage_data, process, inputs=inputs, started=started, held_out=held_out)
        elif process.is_first:
            sys.stdout.write(f"stage {name}: already finished and unchanged: {decision.folder}\n")
        if process.is_first:
            if evaluate and (decision.trains or not _is_evaluated(decision.folder, evaluation, request)):
                from student_train.evaluation.model_evaluation import evaluate_model

                evaluate_model(decision.folder, stage.list_evaluation_sources(cache_path), evaluation)
            for lock in locks:
                lock.check()
            install_result(decision, stage)


def _is_evaluated(folder: Path, section: EvaluationSection, request: StageRequest) -> bool:
    """Return whether a finished stage has an evaluation.json made with these settings.

    False with --again and --again-if-changed: an ablation passes them when a cache may have changed.
    """
    if request.again != "never":
        return False
    try:
        document = json.loads((folder / "evaluation.json").read_bytes())
    except (OSError, ValueError):
        return False
    return document.get("settings") == section.model_dump(mode="json")
