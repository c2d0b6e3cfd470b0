"""Forecasts bytes and hours of a recipe from published sizes alone, before data or models are here.

It knows parameters (models.yaml), rows of the splits (data.published_rows), peaks of GPUs (hardware.yaml) and the
constants of assumptions.py, and nothing else. `plan` without --hardware measures instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.config import Experiment, read_experiment
from stillhouse.published import assumptions
from stillhouse.published.assumptions import SampleLengths, estimate_relation_bytes, estimate_row_bytes
from stillhouse.published.hardware import Hardware
from stillhouse.published.models import load_published_models
from storage.config import CacheSection
from storage.config_loader import read_sections
from storage.errors import ConfigError
from student_train.config import StageSection
from student_train.training.trainer import resolve_stage
from teacher_dump.config import DataSection, SourceSection


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a vision-language model, and how many positions an image takes in it."""

    decoder: float
    tower: float  # 0 where the published number is that of the whole model, which is then the decoder's
    hidden: int
    visual_tokens: int

    @property
    def parameters(self) -> float:
        return self.decoder + self.tower


@dataclass(frozen=True)
class StageForecast:
    """One training."""

    name: str
    samples: float
    tokens: float
    flops: float
    hours: float
    checkpoint_bytes: float


@dataclass(frozen=True)
class CacheForecast:
    """One cache, and the teacher's work for it."""

    name: str
    samples: int
    tokens: float
    family_bytes: dict[str, float]
    hours: float

    @property
    def total_bytes(self) -> float:
        return sum(self.family_bytes.values())


@dataclass(frozen=True)
class RecipeForecast:
    """Everything that a recipe will write and take."""

    hardware: Hardware
    lengths: SampleLengths
    caches: tuple[CacheForecast, ...]
    stages: tuple[StageForecast, ...]
    price_per_gpu_hour: float | None

    @property
    def hours(self) -> float:
        return sum(each.hours for each in (*self.caches, *self.stages))

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.hardware.count

    @property
    def total_bytes(self) -> float:
        checkpoints = sum(stage.checkpoint_bytes for stage in self.stages)
        return sum(cache.total_bytes for cache in self.caches) + checkpoints

    @property
    def price(self) -> float | None:
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour

    def to_json(self) -> dict[str, Any]:
        """Returns the forecast as plain data, marked as an estimate."""
        totals = {"hours": self.hours, "gpu_hours": self.gpu_hours, "total_bytes": self.total_bytes}
        return {"estimate": True, **asdict(self), **totals, "price": self.price}


def forecast_recipe(
    experiment: Experiment,
    hardware: Hardware,
    *,
    lengths: SampleLengths | None = None,
    price_per_gpu_hour: float | None = None,
) -> RecipeForecast:
    """Forecasts dumps and trainings. ConfigError for a model or a split whose published size is not known."""
    lengths = lengths or SampleLengths()
    teacher = None
    caches = []
    main = experiment.data, experiment.cache
    for name, data, cache in (("cache", *main), *_list_more_caches(experiment)):
        if cache.families and teacher is None:
            teacher = _size_of(experiment, experiment.teacher.model, "teacher.model")
        caches.append(_forecast_cache(name, experiment, data, cache, teacher, hardware, lengths))
    by_split = _collect_splits(experiment)
    stages = tuple(
        _forecast_stage(name, resolve_stage(section, name), experiment, by_split, hardware, lengths)
        for name, section in experiment.stages.items()
    )
    return RecipeForecast(hardware, lengths, tuple(caches), stages, price_per_gpu_hour)


def _list_more_caches(experiment: Experiment) -> Iterator[tuple[str, DataSection, CacheSection]]:
    for path, overrides in experiment.more_caches.items():
        schemas = {"data": DataSection, "cache": CacheSection}
        sections = read_sections(experiment.path, schemas, (*experiment.overrides, *overrides))
        yield Path(path).name, sections["data"], sections["cache"]


@dataclass(frozen=True)
class _Split:
    rows: int
    is_caption: bool
    is_pair: bool


def _collect_splits(experiment: Experiment) -> dict[str, _Split]:
    """The splits of all caches, by name. ConfigError where the published number of rows is missing."""
    splits: dict[str, _Split] = {}
    paired = {
        split for stage in experiment.stages.values() if stage.losses.preference is not None for split in stage.splits
    }
    for data in (experiment.data, *(data for _, data, _ in _list_more_caches(experiment))):
        for source in data.sources:
            rows = data.published_rows.get(source.split)
            if rows is None:
                raise ConfigError(
                    f"{experiment.path}: how many rows the split {source.split} has is not known before its data is "
                    f"here; give data.published_rows.{source.split}, or use `plan` without --hardware, which measures"
                )
            splits.setdefault(source.split, _Split(rows, _is_caption(source), source.split in paired))
    return splits


def _is_caption(source: SourceSection) -> bool:
    return source.template == "caption"


def _forecast_cache(
    name: str,
    experiment: Experiment,
    data: DataSection,
    cache: CacheSection,
    teacher: ModelSize | None,
    hardware: Hardware,
    lengths: SampleLengths,
) -> CacheForecast:
    known = _collect_splits(experiment)
    splits = [known[split] for split in dict.fromkeys(source.split for source in data.sources)]
    samples = sum(split.rows * (2 if split.is_pair else 1) for split in splits)
    images = sum(split.rows for split in splits)
    text = responses = 0.0
    for split in splits:
        answers = split.rows * (2 if split.is_pair else 1)
        responses += answers * (lengths.caption if split.is_caption else lengths.response)
        text += answers * (lengths.caption if split.is_caption else lengths.question + lengths.response)
    family_bytes = {"tokens": samples * assumptions.SAMPLE_BYTES + text * assumptions.ID_BYTES}
    tokens, hours = text, 0.0
    if teacher is not None and cache.families:
        tokens += samples * teacher.visual_tokens
        rows = images * teacher.visual_tokens
        sizes = {
            "response": responses * estimate_row_bytes(cache.response),
            "visual": rows * estimate_row_bytes(cache.visual),
            "relation": images * estimate_relation_bytes(cache.relation, teacher.visual_tokens),
            "hidden": responses * teacher.hidden * (2 if cache.hidden.encoding == "float16" else 1),
            "sequence": sum(split.rows for split in splits if split.is_pair) * assumptions.PAIR_BYTES,
        }
        family_bytes |= {family: sizes[family] for family in cache.families if family in sizes}
        flops = assumptions.FORWARD * (tokens * teacher.decoder + samples * teacher.visual_tokens * teacher.tower)
        hours = _compute_hours(flops, hardware, assumptions.SCORING_UTILISATION)
    return CacheForecast(name, samples, tokens, family_bytes, hours)


def _forecast_stage(
    name: str,
    stage: StageSection,
    experiment: Experiment,
    by_split: dict[str, _Split],
    hardware: Hardware,
    lengths: SampleLengths,
) -> StageForecast:
    size = _size_of(experiment, stage.init, f"stages.{name}.init")
    unknown = [split for split in stage.splits if split not in by_split]
    if unknown:
        raise ConfigError(f"{experiment.path}: stages.{name}.splits names {unknown[0]}, which no source has")
    splits = [by_split[split] for split in stage.splits]
    rows = sum(split.rows for split in splits)
    trained = stage.steps * stage.global_batch if stage.steps is not None else rows * (stage.epochs or 0)
    sequences = tokens = 0.0
    for split in splits:
        share = trained * split.rows / rows * (2 if split.is_pair else 1)
        length = lengths.caption if split.is_caption else lengths.question + lengths.response
        sequences += share
        tokens += share * (length + size.visual_tokens)
    trains_decoder = bool({"llm", "layers", "mlp"} & set(stage.train))
    work = assumptions.FORWARD + assumptions.ACTIVATIONS + (assumptions.WEIGHTS if trains_decoder else 0)
    work += assumptions.AGAIN if stage.gradient_checkpointing else 0
    factor = assumptions.MOE_FACTOR if _is_sparse(experiment, stage) else 1.0
    tower = assumptions.FORWARD * sequences * size.visual_tokens * size.tower
    flops = work * tokens * size.decoder * factor + tower
    weights = size.parameters * (assumptions.MOE_TOTAL_FACTOR if _is_sparse(experiment, stage) else 1.0)
    return StageForecast(
        name,
        trained,
        tokens,
        flops,
        _compute_hours(flops, hardware, assumptions.TRAINING_UTILISATION),
        weights * assumptions.WEIGHT_BYTES,
    )


def _is_sparse(experiment: Experiment, stage: StageSection) -> bool:
    """Whether a stage trains experts, of its own or of the stage that it starts from."""
    if stage.moe is not None:
        return True
    for name, section in experiment.stages.items():
        other = resolve_stage(section, name)
        if other.output == stage.init and other.output != stage.output:
            return _is_sparse(experiment, other)
    return False


def _compute_hours(flops: float, hardware: Hardware, utilisation: float) -> float:
    return flops / (hardware.count * hardware.tflops * 1e12 * utilisation) / 3600


def _size_of(experiment: Experiment, path: str, field: str, seen: tuple[tuple[Path, str], ...] = ()) -> ModelSize:
    """The published size of a checkpoint: of a Hub id, of what a stage makes, of what the teacher's recipe makes.

    `seen`: checkpoints that lead to this one, with the file that names them; a circle has no size.
    """
    models = load_published_models()
    if path in models:
        model = models[path]
        return ModelSize(model.billions * 1e9, 0.0, model.hidden, model.visual_tokens)
    here = (experiment.path.resolve(), path)
    seen, is_circle = (*seen, here), here in seen
    for name, section in experiment.stages.items() if not is_circle else ():
        stage = resolve_stage(section, name)
        if stage.init == path and stage.compose is not None:
            return _size_of_parts(experiment, stage.compose.vision, stage.compose.llm)
        if stage.output == path:
            return _size_of(experiment, stage.init, field, seen)
    if path == experiment.teacher.model and experiment.teacher.recipe is not None and not is_circle:
        recipe = read_experiment(experiment.path.parent / experiment.teacher.recipe)
        return _size_of(recipe, path, f"{recipe.path}: {field}", seen)
    raise ConfigError(
        f"{experiment.path}: {field} is {path}, whose published size is not known here; known are "
        f"{', '.join(models)}, what stages compose of these, and what teacher.recipe makes of these"
    )


def _size_of_parts(experiment: Experiment, vision: str, llm: str) -> ModelSize:
    models = load_published_models()
    for part, name in (("vision", vision), ("llm", llm)):
        if name not in models:
            raise ConfigError(
                f"{experiment.path}: compose.{part} is {name}, whose published size is not known here; known are "
                f"{', '.join(models)}"
            )
    tower, decoder = models[vision], models[llm]
    return ModelSize(decoder.billions * 1e9, tower.billions * 1e9, decoder.hidden, tower.visual_tokens)
