"""`stillhouse check`: finds mistakes before anything costs money. It loads no weights and starts no teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path

from stillhouse.ablate import list_grid
from stillhouse.composed_teacher import find_composed_teacher
from stillhouse.config import Experiment
from stillhouse.preflight import check_preconditions, list_made_checkpoints, may_be_made_by_prepare
from stillhouse.published.missing_inputs import format_missing_inputs, list_missing_inputs
from storage.backends.folder import open_folder
from storage.config import CacheSection
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError
from storage.identity import Identity
from storage.layout.segments import NewSegment, find_segment, has_cache
from storage.reader.cache import Cache
from student_train.config import StageSection
from student_train.models.expert_parallel import check_ranks
from student_train.models.loading import Checkpoint, check_fit, read_checkpoint
from student_train.models.trained_parameters import count_parameters, describe_trained
from student_train.training.init_making import check_init_making, list_init_parts
from student_train.training.stage_data import check_architecture, check_losses, read_fitting_checkpoint
from student_train.training.trainer import resolve_stage
from teacher_dump.audit.preflight import check_teacher, list_teacher_warnings
from teacher_dump.engine_check.gate import has_engine, measure_engine, refuse_difference
from teacher_dump.execution.worker_setup import inspect_data
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.planning.recorded_budget import make_comparable_identity
from teacher_dump.settings import DumpSettings, read_settings


def check_experiment(experiment: Experiment) -> Iterator[str]:
    """Yields a line for each check that passes, and at the end what was not checked.

    StillhouseError at the first check that fails. Checks of files that `prepare` or `train_teacher` have yet to make
    are left out and named.
    """
    yield f"{experiment.path}: valid"
    yield from _check_inputs_are_here(experiment)
    yield from check_preconditions(experiment)
    _check_experts(experiment)
    settings = read_settings(experiment.path, experiment.overrides)
    unprepared = _find_unprepared(experiment)
    if unprepared:
        assert experiment.prepare is not None
        yield (
            f"not checked yet: samples, prompts, teacher, cache and losses; {experiment.prepare.script}, which `run` "
            f"starts first, has yet to make {_join_first(unprepared)}"
        )
        return
    stage = find_composed_teacher(experiment)
    if stage is not None:
        yield from _check_made_inits(experiment)
        yield (
            f"not checked yet: samples, prompts and cache; `dump` first composes {experiment.teacher.model}, by stage "
            f"{stage}, whose tokenizer and template they need"
        )
        return
    untrained = experiment.train_teacher if not Path(settings.teacher.model).is_dir() else None
    if untrained is not None:  # its tokenizer and processor, which are there, decide what the prompts are
        teacher = settings.teacher.model_copy(update={"model": untrained.tokenizer})
        settings = replace(settings, teacher=teacher)
    plan = plan_dump(settings)
    yield f"samples: {plan.plan.num_samples:,} in {len(plan.plan.parts):,} parts"
    yield from _check_prompts(experiment, settings, plan)
    yield check_teacher(plan, settings.teacher)
    yield from (f"warning: {line}" for line in list_teacher_warnings(plan, settings.teacher))
    if untrained is None:
        yield _check_cache(experiment.cache, plan.identity)
    else:
        yield (
            f"not checked yet: whether the cache fits {experiment.teacher.model}, which stage {untrained.stage} has "
            f"yet to train; {untrained.tokenizer} was checked in its place"
        )
    yield from _check_stages(experiment, plan.identity)
    yield _list_unchecked(experiment)


def _check_inputs_are_here(experiment: Experiment) -> Iterator[str]:
    """Yields a line for each model to download. ConfigError that lists everything if anything else is missing."""
    missing = list_missing_inputs(experiment, is_made=lambda path: _is_made_later(experiment, path))
    if any(each.kind != "hub" for each in missing):
        raise ConfigError(format_missing_inputs(experiment.path, missing))
    yield from (f"not here yet: {each.path}, {each.text}; commands download it" for each in missing)


def check_engine_outputs(experiment: Experiment, *, notify: Callable[[str], None]) -> None:
    """Compares the engine with the model itself on a few samples, and reports the figures.

    ConfigError if the samples or the teacher are not there yet; StillhouseError if the two differ by more than
    check.max_engine_kl, once the figures were reported.
    """
    settings = read_settings(experiment.path, experiment.overrides)
    missing = _find_unprepared(experiment)
    if experiment.train_teacher is not None and not Path(settings.teacher.model).is_dir():
        missing = [*missing, settings.teacher.model]
    if find_composed_teacher(experiment) is not None:
        missing = [*missing, settings.teacher.model]
    if missing:
        raise ConfigError(f"--engine: cannot be checked yet: `run` has yet to make {_join_first(missing)}")
    planned = plan_dump(settings)
    if not has_engine(planned, settings):
        notify("engine: nothing to compare, since no engine but transformers scores anything")
        return
    refuse_difference(measure_engine(planned, settings, notify=notify), planned, settings)
    notify(f"engine: says what the model says, within {settings.check.max_engine_kl:g} nats a row")


def _list_unchecked(experiment: Experiment) -> str:
    """What `check` does not check, with the verb that does, so that nobody believes it was checked."""
    lines = ["weights, of teacher and students alike, and whether they fit into memory (`dump` and `train` load them)"]
    if experiment.teacher.backend == "vllm":
        lines.append("whether vLLM starts and gives the model's outputs (`check --engine` and `plan` compare them)")
    lines.append("whether the teacher sees its images (`dump`)")
    lines += [f"the samples of {path} (`run` dumps it)" for path in experiment.more_caches]
    rounds = list(dict.fromkeys(run.name for run in list_grid(experiment) if run.round_cache is not None))
    if rounds:
        lines.append(f"the answers that {_join_first(rounds)} train on (`run` and `ablate` generate and dump them)")
    if has_cache(open_folder(experiment.cache.path)):
        lines.append("the bytes of the cache (`verify`) and whether its rows still fit the teacher (`verify --replay`)")
    for name, section in experiment.stages.items():
        stage = resolve_stage(section, name)
        sources = [source.path for source in stage.list_sources(experiment.cache.path)]
        if not Path(stage.init).is_dir():
            lines.append(f"whether the student of stages.{name} fits: {stage.init} is not there yet")
        elif experiment.cache.path not in sources and not all(has_cache(open_folder(path)) for path in sources):
            paths = ", ".join(sources)
            lines.append(f"whether the student of stages.{name} fits: a cache of {paths} is not there yet")
    return "not checked:" + _indent_lines(lines)


def _find_unprepared(experiment: Experiment) -> list[str]:
    """Sources and teacher that are missing because `prepare` has not run yet. ConfigError if its script is missing."""
    if experiment.prepare is None or (experiment.run / "steps" / "prepare.json").exists():
        return []
    script = Path(experiment.prepare.script)
    if not script.is_file():
        raise ConfigError(f"{experiment.path}: prepare.script is {script}, which is not a file")
    teacher = experiment.teacher.model if experiment.train_teacher is None else experiment.train_teacher.tokenizer
    paths = [*(source.path for source in experiment.data.sources), teacher]
    return [path for path in paths if may_be_made_by_prepare(experiment, path) and not _has_match(path)]


def _has_match(pattern: str) -> bool:
    """Whether a path exists, or some path that a pattern matches."""
    return Path(pattern).exists() or bool(glob(pattern))  # noqa: PTH207, for a pattern with folders


def _join_first(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else names)


def _check_prompts(experiment: Experiment, settings: DumpSettings, plan: DumpPlan) -> Iterator[str]:
    """Yields the report on the data. ConfigError if more samples cannot be used than dump.max_error_fraction allows."""
    errors, report = inspect_data(settings, plan)
    yield from report.format_lines()
    total = plan.plan.num_samples + sum(len(part.errors) for part in plan.plan.parts)
    allowed = experiment.dump.max_error_fraction
    examples = "\n  ".join(map(str, errors[:10]))
    if errors and len(errors) > allowed * total:
        raise ConfigError(
            f"{len(errors):,} of {total:,} samples cannot be used, dump.max_error_fraction allows "
            f"{allowed:.1%}:\n  {examples}"
        )
    yield f"prompts: {len(errors):,} of {total:,} samples cannot be used" + (f":\n  {examples}" if errors else "")


def _check_experts(experiment: Experiment) -> None:
    """ConfigError if the ranks of a run of the grid cannot divide its experts."""
    for run in list_grid(experiment):
        check_ranks(run.section.num_processes, run.section.expert_parallel, stage=run.stage)


def _is_made_later(experiment: Experiment, path: str) -> bool:
    """Whether a checkpoint does not exist yet, but `prepare` or a stage may make it."""
    return not Path(path).is_dir() and (
        may_be_made_by_prepare(experiment, path) or Path(path) in list_made_checkpoints(experiment)
    )


def _check_cache(section: CacheSection, identity: Identity) -> str:
    """A line on the cache that the dump would find, and on what it would add. Errors: IdentityError, CacheError."""
    folder = open_folder(section.path)
    found, segments = find_segment(
        folder, make_comparable_identity(identity, section), section.families, append=section.append
    )
    if not segments:
        return f"cache: none at {folder} yet"
    cache = Cache.open(section.path, families=())
    line = f"cache: {folder} fits, {cache.num_samples:,} samples{'' if cache.sealed else ', not sealed yet'}"
    if isinstance(found, NewSegment):
        added = "parts of new samples" if found.adds_to is None else ", ".join(found.families)
        line += f"; the dump would add {added} as segment {found.number}"
    return line


def _check_stages(experiment: Experiment, identity: Identity) -> Iterator[str]:
    """Yields a line for each stage whose student exists and fits its caches, or the teacher of the cache to come.

    Errors: IdentityError if a student does not fit; ConfigError for losses that a cache cannot serve.
    """
    own_cache = experiment.cache.path
    families = {"tokens", *experiment.cache.families}
    if has_cache(open_folder(own_cache)):
        cache = Cache.open(own_cache, families=())
        families |= set(cache.families)
        identity = identity.model_copy(update={"selection": {**cache.identity.selection, **identity.selection}})
    for field, section in _list_losses(experiment):
        for source in section.list_sources(own_cache):
            if source.path == own_cache:
                check_losses(section.losses, identity, families, place=field)
            elif has_cache(open_folder(source.path)):
                other = Cache.open(source.path, families=())
                check_losses(section.losses, other.identity, other.families, place=f"{source.path}: {field}")
    for run in list_grid(experiment):
        if run.round_cache is not None:  # which a dump makes only after a training
            overrides = (*experiment.overrides, *run.round_overrides)
            dumped = read_sections(experiment.path, {"cache": CacheSection}, overrides)["cache"]
            place = f"ablations.runs.{run.name}: losses"
            check_losses(run.section.losses, identity, {"tokens", *dumped.families}, place=place)
    yield from _check_made_inits(experiment)
    for name, section in experiment.stages.items():
        stage = resolve_stage(section, name)
        if not Path(stage.init).is_dir():
            continue
        paths = [source.path for source in stage.list_sources(own_cache)]
        if all(has_cache(open_folder(path)) for path in paths):
            checkpoint, noun = read_fitting_checkpoint(stage, own_cache), "cache" if len(paths) == 1 else "caches"
            yield f"stages.{name}: {stage.init} fits the {noun}{_indent_lines(checkpoint.notes)}"
            yield _describe_training(name, stage, checkpoint)
        elif own_cache in paths:
            checkpoint = read_checkpoint(stage.init)
            check_architecture(checkpoint, stage)
            notes = check_fit(checkpoint, identity)
            yield f"stages.{name}: {stage.init} fits the teacher{_indent_lines(notes)}"
            yield _describe_training(name, stage, checkpoint)


def _describe_training(name: str, stage: StageSection, checkpoint: Checkpoint) -> str:
    """A line with the parameters that a stage trains, by module, before a sparse stage copies MLPs to experts."""
    counts = count_parameters(checkpoint, stage.train)
    dense = "" if stage.moe is None else f", before moe makes {stage.moe.experts} experts of an MLP"
    return f"stages.{name} trains {describe_trained(counts, lora=stage.lora is not None)}{dense}"


def _check_made_inits(experiment: Experiment) -> Iterator[str]:
    """Yields a line for each checkpoint that a stage or a run of the grid composes or prunes of existing ones."""
    named = [(f"stages.{name}", section) for name, section in experiment.stages.items()]
    named += [(f"ablations.runs.{run.name}", run.section) for run in list_grid(experiment) if run.parent is None]
    seen = []
    for name, stage in named:
        making = stage.compose or stage.prune
        if making is None or making in seen:
            continue
        seen.append(making)
        if not any(_is_made_later(experiment, part) for part in list_init_parts(stage)):
            yield f"{name}: {check_init_making(stage, f'{experiment.path}: {name}')}"


def _list_losses(experiment: Experiment) -> Iterator[tuple[str, StageSection]]:
    """Every stage, and the stage of every run of the grid with its changes, with the field of its losses."""
    for name, section in experiment.stages.items():
        yield f"stages.{name}.losses", section
    for name, run in experiment.ablations.runs.items():
        overrides = (*experiment.overrides, *run.make_overrides())
        stages = read_sections(experiment.path, {"stages": NamedSections(StageSection)}, overrides)["stages"]
        yield f"ablations.runs.{name}: losses", stages[run.stage]


def _indent_lines(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)
