"""The schema of a whole pipeline.yaml: the sections of every package, and the checks across sections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from storage.config import CacheSection, LocalPath, Section
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError
from student_train.config import EvaluationSection, StageSection
from teacher_dump.config import CheckSection, DataSection, DumpSection, TeacherSection


class PrepareSection(Section):
    """A script that makes data and untrained models before all other steps. It is the user's own, trusted code."""

    script: LocalPath
    arguments: dict[str, str | int | float] = {}  # passed as --name value


class TrainTeacherSection(Section):
    """Trains the teacher first, for experiments that start without one."""

    stage: str  # a name in `stages:`, whose output must be teacher.model
    tokenizer: LocalPath  # checkpoint folder whose tokenizer, chat template and image processor prepare the samples
    data: DataSection  # tokenised into the stage's own cache, without a teacher
    min_exact_match: Annotated[float, Field(ge=0, le=1)] = 0.0  # on the evaluation splits; the run fails below it


class MoreCacheSection(Section):
    """A further cache of the same teacher, dumped after the first, with some fields of this file replaced.

    It lies in <run>/caches/NAME. A run of the grid trains on it by `set: {cache: "{run}/caches/NAME"}`.
    """

    set: dict[str, Any]  # by dotted name, such as data.responses or cache.families

    @field_validator("set")
    @classmethod
    def _check_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for field in fields:
            if field.partition(".")[0] not in ("data", "dump", "cache") or field == "cache.path":
                raise ValueError(f"set has {field!r}, expected fields of data, dump or cache, but not cache.path")
        return fields

    def make_overrides(self, path: str) -> list[str]:
        """The replaced fields as `section.field=value`, for a cache at `path`."""
        return [f"{field}={json.dumps(value)}" for field, value in {**self.set, "cache.path": path}.items()]


class RoundsSection(Section):
    """Repeats a run on answers of the model that learns: generate, dump, train, and again with the trained model.

    Round 1 starts from the checkpoint of the run's `after`, or of its stage's `init`; that model answers first. Round
    N is the run NAME_roundN of the grid, which starts from round N - 1. A number in place of the section is `number`.
    """

    number: Annotated[int, Field(ge=1, le=1000)]  # of rounds
    # of each round, with `{round}` and `{seed}`; null: {run}/caches/NAME_round{round}/seed{seed}
    cache: LocalPath | None = None
    # fields of data, dump or cache for the rounds' caches, by dotted name, such as data.sampling.temperature
    set: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_number(cls, given: Any) -> Any:
        return {"number": given} if isinstance(given, int) and not isinstance(given, bool) else given

    @field_validator("set")
    @classmethod
    def _check_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for field in fields:
            is_reserved = field in ("data", "cache.path", "data.responses", "data.responses.model")
            if field.partition(".")[0] not in ("data", "dump", "cache") or is_reserved:
                raise ValueError(
                    f"set has {field!r}, expected fields of data, dump or cache, but neither cache.path, which is "
                    "rounds.cache, nor data.responses.model, which is the model of the round before"
                )
        return fields


class AblationRunSection(Section):
    """One run of the ablation: a stage with some of its fields replaced."""

    stage: str
    after: str | None = None  # an earlier run, whose checkpoint of the same seed this run starts from
    rounds: RoundsSection | None = None  # trains on answers of the model itself, as often as this says
    set: dict[str, Any] = {}  # fields of the stage, by name; a dotted name is a field of a nested section
    controls: tuple[str, ...] | None = None  # replaces ablations.controls for this run

    def make_overrides(self) -> list[str]:
        """The replaced fields as `section.field=value`, the form that every entry point takes."""
        return [f"stages.{self.stage}.{field}={json.dumps(value)}" for field, value in self.set.items()]


class AblationsSection(Section):
    """Student runs that share one cache."""

    runs: dict[str, AblationRunSection] = {}
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)  # each run is trained once for each seed
    controls: tuple[str, ...] = ()  # runs to compare the others with, paired by seed and question
    cpus_per_run: Annotated[float, Field(gt=0)] = 1  # Ray starts as many runs at once as the CPUs allow
    gpus_per_run: Annotated[float, Field(ge=0)] | None = None  # None: one for each process where Ray has GPUs, else 0

    @field_validator("runs")
    @classmethod
    def _check_runs(cls, runs: dict[str, AblationRunSection]) -> dict[str, AblationRunSection]:
        earlier: list[str] = []
        for name, run in runs.items():
            if run.after is not None and run.after not in earlier:
                expected = ", ".join(earlier) or "none"
                raise ValueError(f"{name}.after is {run.after!r}, expected a run above it: {expected}")
            if name != Path(name).name or name == "..":
                raise ValueError(f"{name!r} cannot be the name of a run, since a folder gets it; leave out slashes")
            for field in ("seed", "output"):
                if field in run.set:
                    raise ValueError(f"{name}.set has {field}, which the grid gives each run; see ablations.seeds")
            if run.after is not None and "init" in run.set:
                raise ValueError(f"{name} has both after and set.init; a run starts from one checkpoint")
            earlier.append(name)
        for name, run in runs.items():
            for label in list_round_names(name, run):
                if label in runs:
                    raise ValueError(f"{label!r} is a round of {name!r} and another run; rename one of them")
        return runs

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {list(seeds)} must differ, or one run would count as two")
        return seeds

    def get_controls(self, name: str) -> tuple[str, ...]:
        """The runs that run `name` is compared with: its own controls, else those of all runs that are no control."""
        own = self.runs[name].controls
        if own is None:
            return () if name in self.controls else self.controls
        return tuple(control for control in own if control != name)


class RoundRunSection(AblationRunSection):
    """One round of a run with `rounds`. Made by `expand_rounds`; no file holds one."""

    of_run: str
    round: int  # from 1


def list_round_names(name: str, run: AblationRunSection) -> list[str]:
    """The names of a run's rounds; none for a run without `rounds`."""
    return [] if run.rounds is None else [f"{name}_round{number}" for number in range(1, run.rounds.number + 1)]


def expand_rounds(section: AblationsSection) -> AblationsSection:
    """Replaces each run with `rounds` by a run for each round, one after another.

    `after` and `controls` that name such a run mean its last round.
    """
    rounds = {name: list_round_names(name, run) for name, run in section.runs.items()}
    last = {name: names[-1] for name, names in rounds.items() if names}
    runs: dict[str, AblationRunSection] = {}
    for name, run in section.runs.items():
        after = last.get(run.after, run.after) if run.after is not None else None
        controls = None if run.controls is None else tuple(last.get(one, one) for one in run.controls)
        run = run.model_copy(update={"after": after, "controls": controls})
        if run.rounds is None:
            runs[name] = run
        for number, label in enumerate(rounds[name], 1):
            fields = {
                **run.model_dump(exclude={"rounds"}),
                "rounds": run.rounds,
                "set": json.loads(json.dumps(run.set).replace("{round}", str(number))),
                "after": after,
            }
            runs[label] = RoundRunSection(**fields, of_run=name, round=number)
            after = label
    return section.model_copy(
        update={"runs": runs, "controls": tuple(last.get(control, control) for control in section.controls)}
    )


SCHEMAS = {
    "prepare": PrepareSection,
    "data": DataSection,
    "teacher": TeacherSection,
    "dump": DumpSection,
    "cache": CacheSection,
    "check": CheckSection,
    "more_caches": NamedSections(MoreCacheSection),
    "train_teacher": TrainTeacherSection,
    "stages": NamedSections(StageSection),
    "evaluation": EvaluationSection,
    "ablations": AblationsSection,
}
OPTIONAL_SECTIONS = ("prepare", "train_teacher", "more_caches")


@dataclass(frozen=True)
class Experiment:
    """One pipeline.yaml with its overrides, checked. Every verb of the command line reads one."""

    path: Path
    overrides: tuple[str, ...]
    name: str
    run: Path  # <runs_dir>/<name>, the folder of everything that the experiment writes
    data: DataSection
    teacher: TeacherSection
    dump: DumpSection
    cache: CacheSection
    stages: dict[str, StageSection]
    evaluation: EvaluationSection
    ablations: AblationsSection
    prepare: PrepareSection | None
    train_teacher: TrainTeacherSection | None
    more_caches: dict[str, tuple[str, ...]]  # overrides of each, by its path

    def get_stage(self, name: str, *, named_by: str) -> StageSection:
        """The stage `name`. ConfigError if there is none, with the field or option `named_by` that names it."""
        if name not in self.stages:
            known = ", ".join(self.stages) or "none"
            raise ConfigError(f"{self.path}: {named_by} names the stage {name!r}; stages: has {known}")
        return self.stages[name]


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment. ConfigError names the file, the field, the value and what is expected."""
    present = read_sections(path, {}, overrides).document
    schemas = {key: schema for key, schema in SCHEMAS.items() if key not in OPTIONAL_SECTIONS or key in present}
    sections = read_sections(path, schemas, overrides)
    experiment = Experiment(
        path=path,
        overrides=tuple(overrides),
        name=sections.name,
        run=sections.run,
        data=sections["data"],
        teacher=sections["teacher"],
        dump=sections["dump"],
        cache=sections["cache"],
        stages=sections["stages"],
        evaluation=sections["evaluation"],
        ablations=expand_rounds(sections["ablations"]),
        prepare=sections.get("prepare"),
        train_teacher=sections.get("train_teacher"),
        more_caches={
            path: tuple(section.make_overrides(path))
            for name, section in (sections.get("more_caches") or {}).items()
            for path in [str(sections.run / "caches" / name)]
        },
    )
    for extra in experiment.more_caches.values():
        read_sections(path, {key: SCHEMAS[key] for key in ("data", "dump", "cache")}, (*overrides, *extra))
    for name, run in experiment.ablations.runs.items():
        experiment.get_stage(run.stage, named_by=f"ablations.runs.{name}.stage")
        stages = read_sections(path, {"stages": NamedSections(StageSection)}, (*overrides, *run.make_overrides()))[
            "stages"
        ]
        _check_gpus_per_run(path, name, stages[run.stage].num_processes, experiment.ablations.gpus_per_run)
        if isinstance(run, RoundRunSection):
            _check_round(experiment, name, run, stages[run.stage])
        for control in experiment.ablations.get_controls(name):
            if control not in experiment.ablations.runs:
                raise ConfigError(f"{path}: controls of {name}: {control!r} is not one of ablations.runs")
    if experiment.train_teacher is not None:
        stage = experiment.get_stage(experiment.train_teacher.stage, named_by="train_teacher.stage")
        if Path(stage.output) != Path(experiment.teacher.model):
            raise ConfigError(
                f"{path}: stages.{experiment.train_teacher.stage}.output is {stage.output}, but teacher.model is "
                f"{experiment.teacher.model}; the dump must use the teacher that is trained"
            )
        if stage.cache is None:
            raise ConfigError(
                f"{path}: stages.{experiment.train_teacher.stage}.cache is missing; the teacher trains on a cache "
                "of its own, made from train_teacher.data"
            )
    return experiment


def _check_round(experiment: Experiment, name: str, run: RoundRunSection, stage: StageSection) -> None:
    """ConfigError for a round whose cache could not be made."""
    assert run.rounds is not None
    place = f"{experiment.path}: ablations.runs.{run.of_run}"
    if run.after is None and (stage.compose is not None or stage.prune is not None):
        raise ConfigError(
            f"{place}: rounds start from {stage.init}, which stage {run.stage} composes or prunes and nobody has "
            "trained; name a run that trains it by `after`"
        )
    given = run.rounds.cache
    if given is not None:
        if run.rounds.number > 1 and "{round}" not in given:
            raise ConfigError(
                f"{place}: rounds.cache is {given}; each round has a cache of its own: use {{round}} in it"
            )
        if len(experiment.ablations.seeds) > 1 and "{seed}" not in given:
            raise ConfigError(f"{place}: rounds.cache is {given}; each seed has a cache of its own: use {{seed}} in it")
    overrides = (*experiment.overrides, *make_round_overrides(experiment, name, stage, seed=0, model=stage.init))
    read_sections(experiment.path, {key: SCHEMAS[key] for key in ("data", "dump", "cache")}, overrides)


def get_round_cache(experiment: Experiment, name: str, *, seed: int) -> str | None:
    """The path of the cache that run `name` trains on if it is a round; else None."""
    run = experiment.ablations.runs[name]
    if not isinstance(run, RoundRunSection):
        return None
    assert run.rounds is not None
    path = run.rounds.cache or str(experiment.run / "caches" / name / "seed{seed}")
    return path.replace("{round}", str(run.round)).replace("{seed}", str(seed))


def make_round_overrides(
    experiment: Experiment, name: str, stage: StageSection, *, seed: int, model: str
) -> tuple[str, ...]:
    """The overrides with which the cache of round `name` is dumped. `model`: who answers.

    Unless the file gives other sources, only those are asked whose split the stage trains on or selects by.
    """
    run = experiment.ablations.runs[name]
    assert isinstance(run, RoundRunSection) and run.rounds is not None  # noqa: PT018
    path = get_round_cache(experiment, name, seed=seed)
    splits = {split for source in stage.list_sources("") for split in source.splits or ()}
    splits |= set() if stage.checkpoints is None else set(stage.checkpoints.splits)
    sources = [
        source.model_dump(mode="json", exclude_unset=True)
        for source in experiment.data.sources
        if source.split in splits
    ]
    fields = {
        "data.sources": sources,
        "data.responses": {"model": model},
        **run.rounds.set,
        "cache.path": path,
    }
    texts = [f"{field}={json.dumps(value)}" for field, value in fields.items()]
    return tuple(text.replace("{round}", str(run.round)).replace("{seed}", str(seed)) for text in texts)


def _check_gpus_per_run(path: Path, run: str, num_processes: int, gpus: float | None) -> None:
    """ConfigError for a run with fewer GPUs than processes; 0 GPUs mean that it runs on CPUs."""
    if gpus and gpus < num_processes and num_processes > 1:
        raise ConfigError(
            f"{path}: ablations.gpus_per_run is {gpus:g}, but run {run!r} has {num_processes} processes and each needs "
            "a GPU of its own; leave gpus_per_run out, or set num_processes to 1"
        )
    if gpus and gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"{path}: ablations.gpus_per_run is {gpus:g}; beyond 1, Ray gives whole GPUs only")
