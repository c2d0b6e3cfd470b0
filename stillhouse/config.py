"""The whole of pipeline.yaml, composed of every package's own sections and checked as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from storage.config import CacheSection, LocalPath, Section
from storage.config_loader import NamedSections, read_sections
from storage.errors import ConfigError
from student_train.config import EvaluationSection, StageSection
from teacher_dump.config import DataSection, DumpSection, TeacherSection


class PrepareSection(Section):
    """A script that makes data and untrained models before anything else; trusted code of the user's own."""

    script: LocalPath
    arguments: dict[str, str | int | float] = {}  # passed as --name value


class TrainTeacherSection(Section):
    """Trains the teacher itself, for experiments that start without one."""

    stage: str  # of `stages:`; its output must be teacher.model
    tokenizer: LocalPath  # checkpoint folder whose tokenizer, template and image processor prepare the samples
    data: DataSection  # tokenised into the stage's own cache, without a teacher
    min_exact_match: Annotated[float, Field(ge=0, le=1)] = 0.0  # on the evaluation splits; below it the run fails


class AblationRunSection(Section):
    """One row of the table: a stage, with some of its fields replaced."""

    stage: str
    after: str | None = None  # a run above, whose checkpoint of the same seed is this one's init
    set: dict[str, Any] = {}  # fields of the stage; dotted names reach into its sections
    controls: tuple[str, ...] | None = None  # in place of ablations.controls

    def overrides(self) -> list[str]:
        """The replaced fields as `section.field=value`, the form that every entry point takes."""
        return [f"stages.{self.stage}.{field}={json.dumps(value)}" for field, value in self.set.items()]


class AblationsSection(Section):
    """Student runs over one and the same cache."""

    runs: dict[str, AblationRunSection] = {}
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)  # every run once a seed
    controls: tuple[str, ...] = ()  # runs that distillation must beat; paired differences are taken to them
    cpus_per_run: Annotated[float, Field(gt=0)] = 1  # as many runs at once as the machine (or cluster) holds
    gpus_per_run: Annotated[float, Field(ge=0)] | None = None  # None: one a process where Ray has GPUs, or 0

    @field_validator("runs")
    @classmethod
    def _each_after_one_above(cls, runs: dict[str, AblationRunSection]) -> dict[str, AblationRunSection]:
        above: list[str] = []
        for name, run in runs.items():
            if run.after is not None and run.after not in above:
                raise ValueError(
                    f"{name}.after is {run.after!r}, expected a run above it: {', '.join(above) or 'none'}"
                )
            if name != Path(name).name or name == "..":
                raise ValueError(f"{name!r} is no name of a run: it becomes a folder's; leave out slashes")
            for field in ("seed", "output"):
                if field in run.set:
                    raise ValueError(f"{name}.set has {field}, which the grid gives each run; see ablations.seeds")
            if run.after is not None and "init" in run.set:
                raise ValueError(f"{name} has both after and set.init; a run starts from one checkpoint")
            above.append(name)
        return runs

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {list(seeds)} must differ: a seed twice is one run, counted as two")
        return seeds

    def controls_of(self, name: str) -> tuple[str, ...]:
        """The runs that `name` is compared to; a control is not compared to itself."""
        own = self.runs[name].controls
        return tuple(control for control in (self.controls if own is None else own) if control != name)


SCHEMAS = {
    "prepare": PrepareSection,
    "data": DataSection,
    "teacher": TeacherSection,
    "dump": DumpSection,
    "cache": CacheSection,
    "train_teacher": TrainTeacherSection,
    "stages": NamedSections(StageSection),
    "evaluation": EvaluationSection,
    "ablations": AblationsSection,
}
OPTIONAL = ("prepare", "train_teacher")


@dataclass(frozen=True)
class Experiment:
    """One pipeline.yaml with its overrides: what every verb of the command line is given."""

    path: Path
    overrides: tuple[str, ...]
    name: str
    run: Path  # <runs_dir>/<name>: everything that this experiment makes
    data: DataSection
    teacher: TeacherSection
    dump: DumpSection
    cache: CacheSection
    stages: dict[str, StageSection]
    evaluation: EvaluationSection
    ablations: AblationsSection
    prepare: PrepareSection | None
    train_teacher: TrainTeacherSection | None

    def stage(self, name: str, *, asked_by: str) -> StageSection:
        """The stage of that name; `ConfigError` naming who asked when there is none."""
        if name not in self.stages:
            known = ", ".join(self.stages) or "none"
            raise ConfigError(f"{self.path}: {asked_by} names the stage {name!r}; stages: has {known}")
        return self.stages[name]


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The checked experiment; `ConfigError` naming file, field, what was got and what is expected."""
    present = read_sections(path, {}, overrides).document
    sections = read_sections(
        path, {key: schema for key, schema in SCHEMAS.items() if key not in OPTIONAL or key in present}, overrides
    )
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
        ablations=sections["ablations"],
        prepare=sections.get("prepare"),
        train_teacher=sections.get("train_teacher"),
    )
    for name, run in experiment.ablations.runs.items():
        experiment.stage(run.stage, asked_by=f"ablations.runs.{name}.stage")
        stages = read_sections(path, {"stages": NamedSections(StageSection)}, (*overrides, *run.overrides()))["stages"]
        _refuse_shared_gpus(path, name, stages[run.stage].num_processes, experiment.ablations.gpus_per_run)
        for control in experiment.ablations.controls_of(name):
            if control not in experiment.ablations.runs:
                raise ConfigError(f"{path}: controls of {name}: {control!r} is not one of ablations.runs")
    if experiment.train_teacher is not None:
        stage = experiment.stage(experiment.train_teacher.stage, asked_by="train_teacher.stage")
        if Path(stage.output) != Path(experiment.teacher.model):
            raise ConfigError(
                f"{path}: stages.{experiment.train_teacher.stage}.output is {stage.output}, but teacher.model is "
                f"{experiment.teacher.model}; the trained teacher must be the one that is dumped"
            )
        if stage.cache is None:
            raise ConfigError(
                f"{path}: stages.{experiment.train_teacher.stage}.cache is missing; the teacher trains on a cache "
                "of its own, made from train_teacher.data"
            )
    return experiment


def _refuse_shared_gpus(path: Path, run: str, num_processes: int, gpus: float | None) -> None:
    """ConfigError for a run whose processes would have fewer GPUs than there are of them; 0 means CPUs."""
    if gpus and gpus < num_processes and num_processes > 1:
        raise ConfigError(
            f"{path}: ablations.gpus_per_run is {gpus:g}, but run {run!r} has {num_processes} processes and each needs "
            "a GPU of its own; leave gpus_per_run out, or set num_processes to 1"
        )
    if gpus and gpus > 1 and gpus != int(gpus):
        raise ConfigError(f"{path}: ablations.gpus_per_run is {gpus:g}; beyond 1, Ray gives whole GPUs only")
