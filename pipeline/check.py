"""What can be found wrong before anything costs money: no weights are loaded, no teacher is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import Experiment
from storage.config import CacheSection
from storage.errors import ConfigError
from storage.files import open_folder
from storage.identity import Identity
from storage.reader import Cache
from storage.sections import Named, read_sections
from storage.segments import NewSegment, find_segment, has_cache
from student_train.composition import check_parts, parts_of
from student_train.config import SourceSection, StageSection
from student_train.expert_parallel import check_ranks
from student_train.material import check_architecture, check_losses, fitting_checkpoint
from student_train.models import check_fit, is_hub_id, read_checkpoint
from student_train.trainer import resolved
from teacher_dump.assignment import prompt_errors
from teacher_dump.budget_choice import comparable
from teacher_dump.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.teacher_check import check_teacher


def check(experiment: Experiment) -> Iterator[str]:
    """Yields one line a finding that is in order; `StillhouseError` at the first that is not."""
    yield f"{experiment.path}: valid"
    settings = read_settings(experiment.path, experiment.overrides)
    planned = plan_dump(settings)
    yield f"samples: {planned.plan.num_samples:,} in {len(planned.plan.parts):,} parts"
    errors = prompt_errors(settings, planned)
    total = planned.plan.num_samples + sum(len(part.errors) for part in planned.plan.parts)
    allowed = experiment.dump.max_error_fraction
    named = "\n  ".join(map(str, errors[:10]))
    if errors and len(errors) > allowed * total:
        raise ConfigError(
            f"{len(errors):,} of {total:,} samples cannot be used, dump.max_error_fraction allows "
            f"{allowed:.1%}:\n  {named}"
        )
    yield f"prompts: {len(errors):,} of {total:,} samples cannot be used" + (f":\n  {named}" if errors else "")
    _check_splits(experiment)
    _check_inits(experiment)
    yield check_teacher(planned, settings.teacher)
    yield _check_cache(experiment.cache, planned.identity)
    yield from _check_stages(experiment, planned.identity)


def _check_splits(experiment: Experiment) -> None:
    """ConfigError for a split of stages, their checkpoints or evaluation that no source of the data gives.

    Held-out samples may lie in any cache of a stage.
    """
    given = {source.split for source in experiment.data.sources}
    here = experiment.cache.path
    sources = {name: list(_sources(name, stage, here)) for name, stage in experiment.stages.items()}
    asked = {
        place: (source.splits or (), set())
        for each in sources.values()
        for place, source in each
        if source.path == here
    }
    others = {name: _splits_of([source.path for _, source in each], here) for name, each in sources.items()}
    for name, stage in experiment.stages.items():
        if stage.checkpoints is not None and any(source.path == here for _, source in sources[name]):
            asked[f"stages.{name}.checkpoints"] = stage.checkpoints.splits, others[name]
    if experiment.ablations.runs:  # which are evaluated
        asked["evaluation"] = experiment.evaluation.splits, set().union(*others.values())
    for place, (splits, elsewhere) in asked.items():
        unknown = [split for split in splits if split not in given | elsewhere]
        if unknown:
            raise ConfigError(
                f"{experiment.path}: {place}.splits names {', '.join(unknown)}; "
                f"data.sources has {', '.join(sorted(given))}"
                + (f", other caches {', '.join(sorted(elsewhere))}" if elsewhere else "")
            )


def _splits_of(paths: Sequence[str], here: str) -> set[str]:
    """Of the caches that are there, without the one of this file."""
    there = [path for path in paths if path != here and has_cache(open_folder(path))]
    return {split for path in there for split in Cache.open(path, ()).splits}


def _check_inits(experiment: Experiment) -> None:
    """ConfigError for a checkpoint, cache or folder that is not there, and that nothing in this file will make."""
    stages = {name: resolved(section, name) for name, section in experiment.stages.items()}
    caches = {experiment.cache.path} | (
        {experiment.stages[experiment.train_teacher.stage].cache} if experiment.train_teacher else set()
    )
    for name, stage in stages.items():
        for place, source in _sources(name, stage, experiment.cache.path):
            if source.path not in caches and not has_cache(open_folder(source.path)):
                field = f"{place}.cache" if stage.caches is None else f"{place}.path"
                raise ConfigError(
                    f"{experiment.path}: {field} is {source.path}: no cache is there, and this file makes none"
                )
            images = source.images
            if images is not None and not Path(images).is_dir() and not _prepared(experiment, images):
                raise ConfigError(f"{experiment.path}: {place}.images is {images}: there is no such folder")
    outputs = {Path(stage.output) for stage in stages.values()}
    for name, stage in stages.items():
        place = Path(stage.init)
        made = _prepared(experiment, place) or place in outputs or stage.compose is not None
        if not (place.is_dir() or made or is_hub_id(stage.init)):
            raise ConfigError(
                f"{experiment.path}: stages.{name}.init is {stage.init}: there is no such folder, no stage writes it, "
                "and a hub id is owner/name"
            )


def _sources(name: str, stage: StageSection, cache_path: str) -> Iterator[tuple[str, SourceSection]]:
    """What a stage trains on, with the place in the file where it says so."""
    for number, source in enumerate(stage.sources(cache_path)):
        yield f"stages.{name}" if stage.caches is None else f"stages.{name}.caches.{number}", source


def _prepared(experiment: Experiment, place: str | Path) -> bool:
    """Whether the script of `prepare` may make a place: it writes into the run's folder."""
    return experiment.prepare is not None and Path(place).is_relative_to(experiment.run)


def _will_be_made(experiment: Experiment, place: str) -> bool:
    """Whether a checkpoint is not there yet, but the script of `prepare` or a stage may make it."""
    outputs = {Path(resolved(section, name).output) for name, section in experiment.stages.items()}
    return not Path(place).is_dir() and (_prepared(experiment, place) or Path(place) in outputs)


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

    Errors: IdentityError; ConfigError for losses of a stage or run that the cache, once dumped, cannot serve, and for
    experts that the ranks of a run, which the file itself starts, cannot share.
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
        stages = read_sections(experiment.path, {"stages": Named(StageSection)}, overrides)["stages"]
        stage = stages[run.stage]
        check_ranks(stage.num_processes, stage.expert_parallel, stage=run.stage)
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
            fitting_checkpoint(stage, experiment.cache.path)
            yield f"stages.{name}: {stage.init} fits the {'cache' if len(paths) == 1 else 'caches'}"
        elif experiment.cache.path in paths:
            checkpoint = read_checkpoint(stage.init)
            check_architecture(checkpoint, stage)
            check_fit(checkpoint, identity)
            yield f"stages.{name}: {stage.init} fits the teacher"
