"""Runs an experiment end to end: prepare, train the teacher if asked, dump, verify, train the students, report.

The ledger records every finished step. A step runs again only if its inputs changed or its outputs are missing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from stillhouse.ablate import train_grid
from stillhouse.cache_steps import dump_cache, print_now, verify_cache
from stillhouse.composed_teacher import compose_teacher
from stillhouse.config import Experiment, PrepareSection, TrainTeacherSection, read_experiment
from stillhouse.ledger import Ledger, fingerprint_cache, fingerprint_path, lock_run
from stillhouse.preflight import print_warnings
from stillhouse.report_page.write_report import write_report
from stillhouse.torchrun import (
    check_training_start,
    count_ranks,
    make_training_arguments,
    make_training_command,
    make_training_environment,
    make_training_flags,
)
from storage.errors import ConfigError, StillhouseError
from storage.processes.child_process import GRACE_S, run_child
from storage.processes.search_path import make_module_command
from storage.processes.stop_signals import Interrupted, find_stop_signal
from student_train.training.stage_inputs import collect_init_inputs


def run_experiment(experiment: Experiment, *, restart: bool = False) -> Path:
    """Runs every step that `experiment` asks for and returns the path of report.html.

    With `restart`, stages discard the saved states of trainings that had other inputs. HeldError if another command
    works in the run's folder.
    """
    with lock_run(experiment.run):
        return _run_steps(experiment, restart=restart)


def _run_steps(experiment: Experiment, *, restart: bool) -> Path:
    print_warnings(experiment)
    ledger = Ledger(experiment.run / "steps")
    if experiment.prepare is not None:
        prepare_data(experiment, experiment.prepare, ledger)
    if experiment.train_teacher is not None:
        train_teacher(experiment, experiment.train_teacher, ledger, restart=restart)
    compose_teacher(experiment)
    dump_cache(experiment)
    verify_cache(experiment.cache.path, ledger)
    for path, overrides in experiment.more_caches.items():
        dump_cache(experiment, overrides)
        verify_cache(path, ledger, step=f"verify-{Path(path).name}")
    if experiment.train_teacher is not None:
        evaluate_model(experiment, Path(experiment.teacher.model), ledger, step="evaluate-teacher-on-cache")
    train_grid(experiment, restart=restart)
    return write_report(experiment.run)


def prepare_data(experiment: Experiment, section: PrepareSection, ledger: Ledger) -> None:
    """Runs the script of `prepare:` with `--out <run>`, unless it has run with the same source files and arguments."""
    script = Path(section.script)
    if not script.is_file():
        raise ConfigError(f"{experiment.path}: prepare.script is {script}, which is not a file")
    sources = {path.name: fingerprint_path(path) for path in sorted(script.parent.glob("*.py"))}
    inputs = {"sources": sources, "arguments": section.arguments}
    outputs = [experiment.run / "data", experiment.run / "models"]
    if ledger.is_done("prepare", inputs, outputs):
        return print_now("data and untrained models: there already")
    _print_redo_reasons(ledger.explain_redo("prepare", inputs, outputs))
    print_now(f"preparing data and untrained models with {script}")
    arguments = [text for name, value in section.arguments.items() for text in (f"--{name}", str(value))]
    module = ".".join(script.with_suffix("").parts)
    _run_command([sys.executable, "-m", module, "--out", str(experiment.run), *arguments], num_threads=1)
    return ledger.record("prepare", inputs)


def train_teacher(experiment: Experiment, section: TrainTeacherSection, ledger: Ledger, *, restart: bool) -> None:
    """Trains the teacher with its stage. StillhouseError if its exact match on held-out questions is too low."""
    stage = experiment.get_stage(section.stage, named_by="train_teacher.stage")
    overrides = (
        f"data={section.data.model_dump_json()}",
        f"teacher.model={json.dumps(section.tokenizer)}",
        f"cache.path={json.dumps(stage.cache)}",
        "cache.families=[]",
    )
    dump_cache(experiment, overrides)
    inputs = {
        "stage": stage.model_dump(mode="json"),
        "init": collect_init_inputs(stage, stage.init.replace("{seed}", str(stage.seed))),
        "cache": fingerprint_cache(stage.cache or experiment.cache.path),
        "evaluation": experiment.evaluation.model_dump(mode="json"),
    }
    folder = Path(stage.output)
    outputs = [folder / "config.json", folder / "evaluation.json"]
    if ledger.is_done("train-teacher", inputs, outputs):
        print_now(f"teacher: trained already, {folder}")
    else:
        print_now(f"training the teacher: stage {section.stage}, {stage.num_processes} processes")
        _print_redo_reasons(ledger.explain_redo("train-teacher", inputs, outputs))
        train_stage(experiment, section.stage, evaluate=True, flags=make_training_flags(restart=restart))
        ledger.record("train-teacher", inputs)
    accuracy = json.loads((folder / "evaluation.json").read_bytes())["exact_match"]
    print_now(f"teacher: exact match {accuracy:.1%} on held-out questions")
    if accuracy < section.min_exact_match:
        raise StillhouseError(
            f"the teacher's exact match is {accuracy:.1%}, expected at least {section.min_exact_match:.1%} "
            "(train_teacher.min_exact_match); a student would learn its mistakes. Train it longer."
        )


def train_stage(
    experiment: Experiment,
    stage_name: str,
    *,
    evaluate: bool = False,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> None:
    """Trains one stage under torchrun and waits for it; `flags` come from make_training_flags.

    ConfigError if the stage refuses its input, StillhouseError if the training fails.
    """
    overrides = (*experiment.overrides, *overrides)
    stage = read_experiment(experiment.path, overrides).get_stage(stage_name, named_by="--stage")
    splits = experiment.evaluation.splits if evaluate else None
    check_training_start(stage, stage_name, experiment.cache.path, splits=splits)
    arguments = make_training_arguments(experiment.path, stage_name, overrides, evaluate=evaluate, flags=flags)
    command = make_training_command(arguments, num_processes=count_ranks(stage.num_processes))
    _run_command(command, num_threads=1, grace_s=math.inf)  # after a signal, saving its state may take long


def evaluate_model(experiment: Experiment, model: Path, ledger: Ledger | None = None, *, step: str = "") -> Path:
    """Evaluates a model on the cache's evaluation splits in a child process; returns <model>/evaluation.json.

    With a `ledger`, an evaluation that is recorded as `step` with the same inputs is not repeated.
    """
    target = model / "evaluation.json"
    inputs = {
        "model": fingerprint_path(model / "config.json"),
        "manifest": fingerprint_cache(experiment.cache.path),
        "evaluation": experiment.evaluation.model_dump(mode="json"),
    }
    if ledger is not None and ledger.is_done(step, inputs, [target]):
        return target
    command = (*make_module_command("student_train.evaluate"), str(experiment.path), "--model", str(model))
    _run_command([*command, *experiment.overrides], num_threads=2)
    if ledger is not None:
        ledger.record(step, inputs)
    return target


def _run_command(command: Sequence[str], *, num_threads: int, grace_s: float = GRACE_S) -> None:
    """Runs a child process. Its exit code 2 becomes a ConfigError, another one but 0 a StillhouseError."""
    code = run_child(command, env=make_training_environment(num_threads), grace_s=grace_s)
    if (number := find_stop_signal(code)) is not None:  # a signal that this process did not get
        raise Interrupted(number)
    if code == 2:
        raise ConfigError("the step above refused its input")
    if code:
        raise StillhouseError(f"{' '.join(command[:6])} … ended with exit code {code}")


def _print_redo_reasons(reasons: list[str]) -> None:
    if reasons:
        print_now("done again:" + "".join(f"\n  {reason}" for reason in reasons))
