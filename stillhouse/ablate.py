"""Trains the ablation grid: every run with every seed, over one cache, scheduled by Ray. Finished runs are kept.

A run that starts from the checkpoint of another (`after`) waits for all seeds of it, and is trained again when that
checkpoint changes. A round (`rounds`) waits in the same way for the model that answers, and then its cache is dumped.
Each run writes <run>/models/<name>/seed<k>/ with its checkpoint, metrics.jsonl, summary.json and evaluation.json.
<run>/ablations.json lists the runs for the report.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stillhouse.cache_steps import dump_cache, verify_cache
from stillhouse.config import Experiment, get_round_cache, make_round_overrides
from stillhouse.ledger import Ledger, fingerprint_cache, fingerprint_path, lock_run
from stillhouse.reporting.reproduction import record_command
from stillhouse.reporting.text_formats import compute_mean_and_sd, format_columns, format_percent
from stillhouse.torchrun import (
    TRAINING_SERVER,
    make_training_arguments,
    make_training_command,
    make_training_environment,
    make_training_flags,
)
from storage.backends.disk import explain_write_errors, suggest_freeing_space
from storage.backends.folder import write_json
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError, IdentityError, StillhouseError
from storage.field_changes import describe_changes
from storage.processes.search_path import make_module_command
from student_train.config import StageSection
from student_train.training.init_making import list_init_parts
from student_train.training.stage_inputs import collect_init_inputs
from student_train.training.trainer import resolve_stage
from teacher_dump.ray_jobs import Command, run_commands


@dataclass(frozen=True)
class GridRun:
    """One run of the grid with one seed."""

    name: str
    stage: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]  # those of the experiment, then those of the run
    section: StageSection  # with the overrides applied
    parent: Path | None  # folder of the run that this one starts from, of the same seed
    round_cache: str | None = None  # of a round: the cache of answers that it trains on
    round_overrides: tuple[str, ...] = ()  # with which that cache is dumped

    @property
    def label(self) -> str:
        """The run's name in messages, in the ledger and of its log file."""
        return f"{self.name}-seed{self.seed}"


def list_grid(experiment: Experiment) -> Iterator[GridRun]:
    """Seed by seed, so that whole seeds can be compared early: every run of `ablations:` in the file's order."""
    for seed in experiment.ablations.seeds:
        for name, run in experiment.ablations.runs.items():
            folder = _get_folder(experiment, name, seed)
            parent = None if run.after is None else _get_folder(experiment, run.after, seed)
            place, round_cache = f"stages.{run.stage}", get_round_cache(experiment, name, seed=seed)
            overrides = (
                *experiment.overrides,
                *_make_cache_overrides(experiment, name, round_cache),
                *_fill_seed(run.make_overrides(), None if round_cache is None else seed),
                f"{place}.seed={seed}",
                f"{place}.output={json.dumps(str(folder))}",
                *(() if parent is None else (f"{place}.init={json.dumps(str(parent))}",)),
            )
            section = read_sections(experiment.path, {"stages": NamedSections(StageSection)}, overrides)["stages"][
                run.stage
            ]
            if round_cache is None:
                yield GridRun(name, run.stage, seed, folder, overrides, section, parent)
                continue
            if round_cache not in [source.path for source in section.list_sources(experiment.cache.path)]:
                raise ConfigError(
                    f"{experiment.path}: ablations.runs: {name} does not train on {round_cache}, the cache of its own "
                    "answers; name it in set.caches, or leave out set.cache and set.caches"
                )
            model = parent or resolve_stage(section, run.stage).init
            dumped = make_round_overrides(experiment, name, section, seed=seed, model=str(model))
            yield GridRun(name, run.stage, seed, folder, overrides, section, parent, round_cache, dumped)


def _make_cache_overrides(experiment: Experiment, name: str, round_cache: str | None) -> Iterator[str]:
    """The caches that a round trains on and is evaluated on, unless the run's `set` says otherwise."""
    run = experiment.ablations.runs[name]
    if round_cache is None:
        return
    if not {"cache", "caches"} & set(run.set):
        yield f"stages.{run.stage}.cache={json.dumps(round_cache)}"
        yield f"stages.{run.stage}.caches=null"
    if experiment.stages[run.stage].evaluation_cache is None:
        yield f"stages.{run.stage}.evaluation_cache={json.dumps(experiment.cache.path)}"


def _fill_seed(overrides: list[str], seed: int | None) -> list[str]:
    """Replaces `{seed}` in the overrides of a round."""
    return overrides if seed is None else [override.replace("{seed}", str(seed)) for override in overrides]


def group_by_parent(experiment: Experiment) -> list[list[GridRun]]:
    """The grid in groups to train one after another: first runs without a parent, then their children, and so on."""
    depths: dict[str, int] = {}
    for name, run in experiment.ablations.runs.items():  # a parent comes before its children in the file
        depths[name] = 0 if run.after is None else depths[run.after] + 1
    runs = list(list_grid(experiment))
    return [[run for run in runs if depths[run.name] == depth] for depth in sorted(set(depths.values()))]


def ablate(experiment: Experiment, *, restart: bool = False) -> list[GridRun]:
    """Runs `train_grid` while holding the lock on the run's folder. HeldError if another command holds it."""
    with lock_run(experiment.run):
        return train_grid(experiment, restart=restart)


def train_grid(experiment: Experiment, *, restart: bool = False) -> list[GridRun]:
    """Trains the runs that are not finished and writes <run>/ablations.json. StillhouseError names failed runs.

    With `restart`, runs discard the saved states of trainings that had other inputs.
    """
    ledger = Ledger(experiment.run / "steps")
    with explain_write_errors(experiment.run / "logs"):
        (experiment.run / "logs").mkdir(parents=True, exist_ok=True)
    command = record_command(experiment.path, experiment.overrides)  # before the file may change
    runs = list(list_grid(experiment))
    _check_made_inits(experiment, runs)
    with tqdm(total=len(runs), desc="students", unit="run") as bar:
        for group in group_by_parent(experiment):
            bar.clear()  # a dump has a bar of its own
            for run in group:
                dump_round_cache(experiment, run, ledger)
            failed = list(_train_group(experiment, group, ledger, bar, restart=restart))
            if failed:
                raise StillhouseError("training failed:\n  " + "\n  ".join(failed))
    listing = [
        {
            "name": run.name,
            "stage": run.stage,
            "seed": run.seed,
            "folder": str(run.folder),
            "caches": [source.path for source in run.section.list_sources(experiment.cache.path)],
        }
        for run in runs
    ]
    document = {
        "runs": listing,
        "controls": {name: experiment.ablations.get_controls(name) for name in experiment.ablations.runs},
        "cache": experiment.cache.path,
        "teacher": experiment.teacher.model,
        "command": command,
    }
    write_json(experiment.run / "ablations.json", document)
    return runs


def dump_round_cache(experiment: Experiment, run: GridRun, ledger: Ledger) -> None:
    """Makes and verifies the cache that a round trains on; does nothing for other runs. A sealed one is kept.

    IdentityError if the cache was made from other answers.
    """
    if run.round_cache is None:
        return
    try:
        dump_cache(experiment, run.round_overrides)
    except IdentityError as error:
        raise IdentityError(
            f"{run.label}: {error}\n{run.round_cache} holds the answers of an earlier model, sampling or teacher; "
            "delete this folder to have it made anew, or undo the change"
        ) from error
    verify_cache(run.round_cache, ledger, step=f"verify-{run.label}")


def _train_group(
    experiment: Experiment, runs: list[GridRun], ledger: Ledger, bar: Any, *, restart: bool
) -> Iterator[str]:
    """Trains the unfinished runs of a group, as many at once as Ray has room for; yields a line for each failure."""
    inputs = {run.label: _collect_inputs(experiment, run) for run in runs}
    waiting = {run.label: run for run in runs if not ledger.is_done(run.label, inputs[run.label], _list_outputs(run))}
    bar.update(len(runs) - len(waiting))
    for run in waiting.values():
        if reasons := ledger.explain_redo(run.label, inputs[run.label], _list_outputs(run)):
            bar.write(f"{run.label} is trained again:" + "".join(f"\n  {reason}" for reason in reasons))
    commands = [_make_command(experiment, run, make_training_flags(restart=restart)) for run in waiting.values()]
    results = run_commands(
        commands,
        experiment.ablations.cpus_per_run,
        experiment.ablations.gpus_per_run,
        address=experiment.dump.ray_address,
        logs=experiment.run / "logs",
    )
    unfinished = set(waiting)
    with closing(results):  # ends the commands that still run if this loop is left early
        for result in results:
            run = waiting[result.name]
            if result.returncode == 0 and all(path.exists() for path in _list_outputs(run)):
                ledger.record(run.label, inputs[run.label], seconds=result.seconds)
                bar.write(f"{run.label}: exact match {_read_accuracy(run):.1%} in {result.seconds:.0f} s")
                unfinished.remove(run.label)
                of_seed = [other for other in runs if other.seed == run.seed]
                if unfinished.isdisjoint(other.label for other in of_seed) and len(of_seed) < len(runs):
                    bar.write(describe_finished_seeds(runs, unfinished))
            else:
                hint = suggest_freeing_space(result.log_path) or suggest_freeing_space(run.folder)
                yield f"{run.label}: exit code {result.returncode}, see {result.log_path}{hint}"
            bar.update()


def describe_finished_seeds(runs: Sequence[GridRun], unfinished: Collection[str]) -> str:
    """A table of exact match so far, over the seeds that all of these runs have finished."""
    seeds = {run.seed for run in runs} - {run.seed for run in runs if run.label in unfinished}
    by_name: dict[str, list[float]] = {}
    for run in runs:
        if run.seed in seeds:
            by_name.setdefault(run.name, []).append(_read_accuracy(run))
    rows = [(name, format_percent(compute_mean_and_sd(values))) for name, values in by_name.items()]
    return format_columns([("run", f"exact match, {len(seeds)} of {len({run.seed for run in runs})} seeds"), *rows])


def _read_accuracy(run: GridRun) -> float:
    return json.loads((run.folder / "evaluation.json").read_bytes())["exact_match"]


def _make_command(experiment: Experiment, run: GridRun, flags: tuple[str, ...]) -> Command:
    """The training of a run. Runs of one process on CPUs share their start: each is a fork of a server."""
    num_processes = run.section.num_processes
    arguments = make_training_arguments(experiment.path, run.stage, run.overrides, evaluate=True, flags=flags)
    is_shared = num_processes == 1 and sys.platform == "linux"
    return Command(
        name=run.label,
        argv=make_training_command(arguments, num_processes=num_processes),
        env=make_training_environment(round(experiment.ablations.cpus_per_run / num_processes)),
        log_path=experiment.run / "logs" / f"{run.label}.log",
        grace_s=math.inf,  # after a signal, saving its state may take long
        num_devices=num_processes,
        server=make_module_command(TRAINING_SERVER) if is_shared else (),
        arguments=arguments,
    )


def check_round_caches(experiment: Experiment) -> None:
    """ConfigError for a round whose cache would have the path of another one. Rounds of equal answers may share it."""
    others: dict[str, tuple[str, object]] = {experiment.cache.path: ("cache.path", None)}
    others |= {path: (f"more_caches.{Path(path).name}", None) for path in experiment.more_caches}
    for run in list_grid(experiment):
        if run.round_cache is None:
            continue
        name, dumped = others.setdefault(run.round_cache, (run.label, run.round_overrides))
        if dumped != run.round_overrides:
            raise ConfigError(
                f"{experiment.path}: the cache of {run.label} would lie in {run.round_cache}, as that of {name}, but "
                "holds other answers; give its rounds.cache another path"
            )


def _check_made_inits(experiment: Experiment, runs: list[GridRun]) -> None:
    """ConfigError for two runs that make different students in one folder, where each would replace the other's."""
    made: dict[str, GridRun] = {}
    for run in runs:
        if run.parent is not None or not list_init_parts(run.section):
            continue
        place = resolve_stage(run.section, run.stage).init
        first = made.setdefault(place, run)
        (field, before), (other, after) = _describe_making(experiment, first), _describe_making(experiment, run)
        changes = describe_changes(before, after, other) if field == other else [f"one has {field}, one {other}"]
        if changes:
            raise ConfigError(
                f"{experiment.path}: {first.label} and {run.label} {other} different students in one folder, {place}; "
                "give each an init of its own, with {seed} in it where seeds differ:"
                + "".join(f"\n  {change}" for change in changes)
            )


def _describe_making(experiment: Experiment, run: GridRun) -> tuple[str, dict[str, Any]]:
    """How a run's init is made: the field that says so, and what decides the result."""
    section = run.section
    if section.compose is not None:
        return "compose", {**section.compose.model_dump(mode="json"), "seed": run.seed}
    assert section.prune is not None
    described = section.prune.model_dump(mode="json")
    if section.prune.measures_change:
        described["caches"] = [
            source.model_dump(mode="json", include={"path", "splits", "filter"})
            for source in section.list_sources(experiment.cache.path)
        ]
    return "prune", described


def _list_outputs(run: GridRun) -> list[Path]:
    return [run.folder / name for name in ("config.json", "summary.json", "evaluation.json")]


def _get_folder(experiment: Experiment, name: str, seed: int) -> Path:
    return experiment.run / "models" / name / f"seed{seed}"


def _collect_inputs(experiment: Experiment, run: GridRun) -> dict[str, Any]:
    if run.parent is not None:  # only its weights matter: other files there describe how they were made
        start: Any = {path.name: fingerprint_path(path) for path in sorted(run.parent.glob("*.safetensors"))}
    else:
        start = collect_init_inputs(run.section, run.section.init.replace("{seed}", str(run.seed)))
    judged = run.section.evaluation_cache
    return {
        "stage": run.section.model_dump(mode="json"),
        "evaluation": experiment.evaluation.model_dump(mode="json"),
        "init": start,
        "cache": [fingerprint_cache(source.path) for source in run.section.list_sources(experiment.cache.path)],
        **({} if judged is None else {"evaluation_cache": fingerprint_cache(judged)}),
    }
