"""The whole road: prepare, train the teacher if asked, dump, verify, train the students, report.

Every step is in the ledger: what is finished and whose inputs have not changed is not done again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from stillhouse.ablate import train_grid
from stillhouse.config import Experiment, PrepareSection, TrainTeacherSection, read_experiment
from stillhouse.ledger import Ledger, cache_fingerprint, file_fingerprint, lock_run
from stillhouse.preflight import warn_first
from stillhouse.reporting.report import write_report
from stillhouse.torchrun import check_start, num_ranks, training_command, training_environment, training_flags
from storage.errors import ConfigError, StillhouseError
from storage.processes.child_process import GRACE_S, run_child
from storage.processes.search_path import make_module_command
from storage.processes.stop_signals import Interrupted, find_stop_signal
from storage.verify.scan_cache import VerifyReport, verify
from student_train.training.stage_inputs import init_inputs
from teacher_dump.__main__ import table
from teacher_dump.dump import run_dump
from teacher_dump.settings import read_settings


def run(experiment: Experiment, *, restart: bool = False) -> Path:
    """Everything that `experiment` asks for; returns the path of report.html.

    `restart`: stages give up states that other inputs made. HeldError: another command works in the run's folder.
    """
    with lock_run(experiment.run):
        return _run(experiment, restart=restart)


def _run(experiment: Experiment, *, restart: bool) -> Path:
    warn_first(experiment)
    ledger = Ledger(experiment.run / "steps")
    if experiment.prepare is not None:
        prepare(experiment, experiment.prepare, ledger)
    if experiment.train_teacher is not None:
        train_teacher(experiment, experiment.train_teacher, ledger, restart=restart)
    dump(experiment)
    check_cache(experiment.cache.path, ledger)
    if experiment.train_teacher is not None:
        evaluate_model(experiment, Path(experiment.teacher.model), ledger, step="evaluate-teacher-on-cache")
    train_grid(experiment, restart=restart)
    return write_report(experiment.run)


def prepare(experiment: Experiment, section: PrepareSection, ledger: Ledger) -> None:
    """Runs the script of `prepare:` with `--out <run>`, unless it did its work from the same source files."""
    script = Path(section.script)
    if not script.is_file():
        raise ConfigError(f"{experiment.path}: prepare.script is {script}, which is not a file")
    sources = {path.name: file_fingerprint(path) for path in sorted(script.parent.glob("*.py"))}
    inputs = {"sources": sources, "arguments": section.arguments}
    if ledger.is_done("prepare", inputs, [experiment.run / "data", experiment.run / "models"]):
        return _say("data and untrained models: there already")
    _say_again(ledger.reasons("prepare", inputs, [experiment.run / "data", experiment.run / "models"]))
    _say(f"preparing data and untrained models with {script}")
    arguments = [text for name, value in section.arguments.items() for text in (f"--{name}", str(value))]
    module = ".".join(script.with_suffix("").parts)
    _call([sys.executable, "-m", module, "--out", str(experiment.run), *arguments], num_threads=1)
    ledger.record("prepare", inputs)
    return None


def train_teacher(experiment: Experiment, section: TrainTeacherSection, ledger: Ledger, *, restart: bool) -> None:
    """Trains the teacher with its stage and checks its exact match on held-out questions."""
    stage = experiment.stage(section.stage, asked_by="train_teacher.stage")
    overrides = (
        f"data={section.data.model_dump_json()}",
        f"teacher.model={json.dumps(section.tokenizer)}",
        f"cache.path={json.dumps(stage.cache)}",
        "cache.families=[]",
    )
    dump(experiment, overrides)
    inputs = {
        "stage": stage.model_dump(mode="json"),
        "init": init_inputs(stage, stage.init.replace("{seed}", str(stage.seed))),
        "cache": cache_fingerprint(stage.cache or experiment.cache.path),
        "evaluation": experiment.evaluation.model_dump(mode="json"),
    }
    folder = Path(stage.output)
    outputs = [folder / "config.json", folder / "evaluation.json"]
    if ledger.is_done("train-teacher", inputs, outputs):
        _say(f"teacher: trained already, {folder}")
    else:
        _say(f"training the teacher: stage {section.stage}, {stage.num_processes} processes")
        _say_again(ledger.reasons("train-teacher", inputs, outputs))
        train(experiment, section.stage, evaluate=True, flags=training_flags(restart=restart))
        ledger.record("train-teacher", inputs)
    accuracy = json.loads((folder / "evaluation.json").read_bytes())["exact_match"]
    _say(f"teacher: exact match {accuracy:.1%} on held-out questions")
    if accuracy < section.min_exact_match:
        raise StillhouseError(
            f"the teacher's exact match is {accuracy:.1%}, expected at least {section.min_exact_match:.1%} "
            "(train_teacher.min_exact_match); a student would learn its mistakes. Train it longer."
        )


def dump(experiment: Experiment, overrides: Sequence[str] = ()) -> None:
    """Runs the dump in this process and prints what it did."""
    _say(table(run_dump(read_settings(experiment.path, (*experiment.overrides, *overrides)))))


def train(
    experiment: Experiment,
    stage_name: str,
    *,
    evaluate: bool = False,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> None:
    """Trains one stage under torchrun in the foreground; `StillhouseError` when it fails. `flags`: `training_flags`."""
    overrides = (*experiment.overrides, *overrides)
    stage = read_experiment(experiment.path, overrides).stage(stage_name, asked_by="--stage")
    splits = experiment.evaluation.splits if evaluate else None
    check_start(stage, stage_name, experiment.cache.path, splits=splits)
    command = training_command(
        experiment.path,
        stage_name,
        overrides,
        num_processes=num_ranks(stage.num_processes),
        evaluate=evaluate,
        flags=flags,
    )
    _call(command, num_threads=1, grace_s=math.inf)  # it saves its state, however long that takes, and ends


def evaluate_model(experiment: Experiment, model: Path, ledger: Ledger | None = None, *, step: str = "") -> Path:
    """Writes <model>/evaluation.json over the cache's evaluation splits, in a process of its own."""
    target = model / "evaluation.json"
    inputs = {
        "model": file_fingerprint(model / "config.json"),
        "manifest": cache_fingerprint(experiment.cache.path),
        "evaluation": experiment.evaluation.model_dump(mode="json"),
    }
    if ledger is not None and ledger.is_done(step, inputs, [target]):
        return target
    command = (*make_module_command("student_train.evaluate"), str(experiment.path), "--model", str(model))
    _call([*command, *experiment.overrides], num_threads=2)
    if ledger is not None:
        ledger.record(step, inputs)
    return target


def check_cache(path: str, ledger: Ledger) -> None:
    """Verifies the sealed cache once; `StillhouseError` lists what is wrong."""
    inputs = {"manifest": cache_fingerprint(path)}
    if ledger.is_done("verify", inputs, []):
        return _say(f"cache: verified already, {path}")
    report = scan(path)
    if not report.ok:
        raise StillhouseError(f"{path} does not verify:\n  " + "\n  ".join(report.problems))
    ledger.record("verify", inputs)
    return _say(f"cache: verified, {path}")


def scan(path: str) -> VerifyReport:
    """The findings of a full scan of the cache, with a progress bar over its bytes."""
    with tqdm(desc="verify", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return verify(path, show)


def _call(command: Sequence[str], *, num_threads: int, grace_s: float = GRACE_S) -> None:
    code = run_child(command, env=training_environment(num_threads), grace_s=grace_s)
    if (number := find_stop_signal(code)) is not None:  # it was told to stop, and we were not
        raise Interrupted(number)
    if code == 2:
        raise ConfigError("the step above refused its input")
    if code:
        raise StillhouseError(f"{' '.join(command[:6])} … ended with exit code {code}")


def _say_again(reasons: list[str]) -> None:
    """Why a step that was finished is done again."""
    if reasons:
        _say("done again:" + "".join(f"\n  {reason}" for reason in reasons))


def _say(text: str) -> None:
    print(text, flush=True)
