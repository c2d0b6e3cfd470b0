"""What can be found wrong before anything costs money: no weights are loaded, no teacher is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path

from stillhouse.ablate import grid
from stillhouse.config import Experiment
from stillhouse.preflight import look_first, may_be_prepared
from storage.backends.folder import open_folder
from storage.config import CacheSection
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError
from storage.identity import Identity
from storage.layout.segments import NewSegment, find_segment, has_cache
from storage.reader.cache import Cache
from student_train.config import StageSection
from student_train.models.compose import check_parts, parts_of
from student_train.models.expert_parallel import check_ranks
from student_train.models.loading import check_fit, read_checkpoint
from student_train.training.stage_data import check_architecture, check_losses, fitting_checkpoint
from student_train.training.trainer import resolved
from teacher_dump.audit.preflight import check_teacher
from teacher_dump.execution.worker_setup import inspect_data
from teacher_dump.planning.dump_plan import DumpPlan, plan_dump
from teacher_dump.planning.recorded_budget import comparable
from teacher_dump.settings import DumpSettings, read_settings


def check(experiment: Experiment) -> Iterator[str]:
    """Yields one line a finding that is in order; `StillhouseError` at the first that is not.

    What the file itself has yet to make (`prepare`, `train_teacher`) is named, and the rest is checked.
    """
    yield f"{experiment.path}: valid"
    yield from look_first(experiment)
    _check_experts(experiment)
    settings = read_settings(experiment.path, experiment.overrides)
    unmade = _unprepared(experiment)
    if unmade:
        assert experiment.prepare is not None
        yield (
            f"not checked yet: samples, prompts, teacher, cache and losses; {experiment.prepare.script}, which `run` "
            f"starts first, has yet to make {_list(unmade)}"
        )
        return
    trained = experiment.train_teacher if not Path(settings.teacher.model).is_dir() else None
    if trained is not None:  # its tokenizer and processor decide what prompts are; it is what the weights begin as
        teacher = settings.teacher.model_copy(update={"model": trained.tokenizer})
        settings = replace(settings, teacher=teacher)
    planned = plan_dump(settings)
    yield f"samples: {planned.plan.num_samples:,} in {len(planned.plan.parts):,} parts"
    yield from _check_prompts(experiment, settings, planned)
    yield check_teacher(planned, settings.teacher)
    if trained is None:
        yield _check_cache(experiment.cache, planned.identity)
    else:
        yield (
            f"not checked yet: whether the cache fits {experiment.teacher.model}, which stage {trained.stage} has yet "
            f"to train; {trained.tokenizer} stood in for it"
        )
    yield from _check_stages(experiment, planned.identity)
    yield _not_looked_at(experiment)


def _not_looked_at(experiment: Experiment) -> str:
    """What only the work itself, or another verb, can tell: nobody shall think that it was checked."""
    unseen = ["weights, of teacher and students alike, and whether they fit into memory (`dump` and `train` load them)"]
    if experiment.teacher.backend == "vllm":
        unseen.append("whether vLLM starts and says what the model says (`dump`)")
    unseen.append("whether the teacher sees its images (`dump` asks)")
    if has_cache(open_folder(experiment.cache.path)):
        unseen.append(
            "the bytes of the cache (`verify`) and whether its rows are still the teacher's (`verify --replay`)"
        )
    for name, section in experiment.stages.items():
        stage = resolved(section, name)
        sources = [source.path for source in stage.sources(experiment.cache.path)]
        if not Path(stage.init).is_dir():
            unseen.append(f"whether the student of stages.{name} fits: {stage.init} is not there yet")
        elif experiment.cache.path not in sources and not all(has_cache(open_folder(path)) for path in sources):
            unseen.append(
                f"whether the student of stages.{name} fits: a cache of {', '.join(sources)} is not there yet"
            )
    return "not looked at:" + _shown(unseen)


def _unprepared(experiment: Experiment) -> list[str]:
    """Sources and a teacher that are not there because `prepare` has not run yet. ConfigError: nor can it."""
    if experiment.prepare is None or (experiment.run / "steps" / "prepare.json").exists():
        return []
    script = Path(experiment.prepare.script)
    if not script.is_file():
        raise ConfigError(f"{experiment.path}: prepare.script is {script}, which is not a file")
    teacher = experiment.teacher.model if experiment.train_teacher is None else experiment.train_teacher.tokenizer
    places = [*(source.path for source in experiment.data.sources), teacher]
    return [place for place in places if may_be_prepared(experiment, place) and not _is_there(place)]


def _is_there(place: str) -> bool:
    return Path(place).exists() or bool(glob(place))  # noqa: PTH207, for a pattern with folders


def _list(names: Sequence[str]) -> str:
    shown = [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else list(names)
    return ", ".join(shown)


def _check_prompts(experiment: Experiment, settings: DumpSettings, planned: DumpPlan) -> Iterator[str]:
    errors, report = inspect_data(settings, planned)
    yield from report.lines()
    total = planned.plan.num_samples + sum(len(part.errors) for part in planned.plan.parts)
    allowed = experiment.dump.max_error_fraction
    named = "\n  ".join(map(str, errors[:10]))
    if errors and len(errors) > allowed * total:
        raise ConfigError(
            f"{len(errors):,} of {total:,} samples cannot be used, dump.max_error_fraction allows "
            f"{allowed:.1%}:\n  {named}"
        )
    yield f"prompts: {len(errors):,} of {total:,} samples cannot be used" + (f":\n  {named}" if errors else "")


def _check_experts(experiment: Experiment) -> None:
    """ConfigError for experts that the ranks of a run, which the file itself starts, cannot share."""
    for run in grid(experiment):
        check_ranks(run.section.num_processes, run.section.expert_parallel, stage=run.stage)


def _will_be_made(experiment: Experiment, place: str) -> bool:
    """Whether a checkpoint is not there yet, but the script of `prepare` or a stage may make it."""
    outputs = {Path(resolved(section, name).output) for name, section in experiment.stages.items()}
    return not Path(place).is_dir() and (may_be_prepared(experiment, place) or Path(place) in outputs)


def _check_cache(section: CacheSection, identity: Identity) -> str:
    """What a dump would find and do. Errors: IdentityError, CacheError."""
    folder = open_folder(section.path)
    found, segments = find_segment(folder, comparable(identity, section), section.families, append=section.append)
    if not segments:
        return f"cache: none at {folder} yet"
    cache = Cache.open(section.path, families=())
    line = f"cache: {folder} fits, {cache.num_samples:,} samples{'' if cache.sealed else ', not sealed yet'}"
    if isinstance(found, NewSegment):
        what = "parts of new samples" if found.adds_to is None else ", ".join(found.families)
        line += f"; the dump would add {what} as segment {found.number}"
    return line


def _check_stages(experiment: Experiment, identity: Identity) -> Iterator[str]:
    """A line for each stage whose student is there: it fits the cache, or the teacher of the one to come.

    Errors: IdentityError; ConfigError for losses of a stage or run that the cache, once dumped, cannot serve.
    """
    has_one = has_cache(open_folder(experiment.cache.path))
    held = {"tokens", *experiment.cache.families}
    if has_one:
        there = Cache.open(experiment.cache.path, families=())
        held |= set(there.families)
        identity = identity.model_copy(update={"selection": {**there.identity.selection, **identity.selection}})
    asked = {f"stages.{name}.losses": section for name, section in experiment.stages.items()}
    for name, run in experiment.ablations.runs.items():
        overrides = (*experiment.overrides, *run.overrides())
        stages = read_sections(experiment.path, {"stages": NamedSections(StageSection)}, overrides)["stages"]
        stage = stages[run.stage]
        asked[f"ablations.runs.{name}: losses"] = stage
    for place, section in asked.items():
        for source in section.sources(experiment.cache.path):
            if source.path == experiment.cache.path:
                check_losses(section.losses, identity, held, place=place)
            elif has_cache(open_folder(source.path)):
                other = Cache.open(source.path, families=())
                check_losses(section.losses, other.identity, other.families, place=f"{source.path}: {place}")
    for name, section in experiment.stages.items():
        stage = resolved(section, name)
        if stage.compose is not None and not any(_will_be_made(experiment, part) for part in parts_of(stage.compose)):
            check_parts(stage.compose, f"{experiment.path}: stages.{name}")
            yield f"stages.{name}: the parts of compose go together"
        if not Path(stage.init).is_dir():
            continue
        paths = [source.path for source in stage.sources(experiment.cache.path)]
        if all(has_cache(open_folder(path)) for path in paths):
            notes = fitting_checkpoint(stage, experiment.cache.path).notes
            yield f"stages.{name}: {stage.init} fits the {'cache' if len(paths) == 1 else 'caches'}{_shown(notes)}"
        elif experiment.cache.path in paths:
            checkpoint = read_checkpoint(stage.init)
            check_architecture(checkpoint, stage)
            notes = check_fit(checkpoint, identity)
            yield f"stages.{name}: {stage.init} fits the teacher{_shown(notes)}"


def _shown(notes: Sequence[str]) -> str:
    """Lines below a line."""
    return "".join(f"\n  {note}" for note in notes)
