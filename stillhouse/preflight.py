"""What `check` looks at first, and `run` and `ablate` before they begin: names, places, room, GPUs, the machine.

No data are read, no model is loaded; the whole takes a second. What would certainly fail is refused, what may become
short is told. What is only guessed at is never refused.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.ablate import grid
from stillhouse.config import Experiment
from storage.backends.disk import check_writable, find_existing_parent, format_bytes, measure_free_bytes
from storage.backends.folder import is_url, open_folder, write_atomically
from storage.errors import ConfigError, StillhouseError
from storage.layout.segments import has_cache
from storage.reader.cache import Cache
from student_train.config import SourceSection, StageSection
from student_train.models.loading import is_hub_id
from student_train.training.trainer import resolved
from teacher_dump.execution.machine import check_dump_machine, check_machine, count_gpus, is_alone, refuse_more_gpus
from teacher_dump.settings import read_settings
from teacher_dump.teachers.hf_checkpoint import read_header, weight_files

_FORECAST = "forecast.json"
_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a weight in a checkpoint
_STATE_BYTES = 12  # a weight that trains: a copy and two moments in float32


@dataclass(frozen=True)
class Need:
    """What something will write."""

    place: Path
    num_bytes: int
    what: str
    kind: Literal["least", "about", "for a while"]  # at least so much, about so much, or so much until it is done


def look_first(experiment: Experiment, *, dumps: bool = True) -> Iterator[str]:
    """Yields what was looked at, a line each; ConfigError for what would certainly fail. `dumps`: the dump runs too."""
    check_splits(experiment)
    check_inits(experiment)
    check_places(experiment)
    yield check_gpus(experiment)
    yield from check_room(needs(experiment), experiment.run)
    trains = any(not (run.folder / "evaluation.json").exists() for run in grid(experiment))
    warnings = check_dump_machine(read_settings(experiment.path, experiment.overrides)) if dumps else []
    if trains:  # Ray runs them
        warnings += check_machine(runs_vllm=False, ray_address=experiment.dump.ray_address)
    yield from (f"warning: {line}" for line in dict.fromkeys(warnings))


def warn_first(experiment: Experiment, *, dumps: bool = True) -> None:
    """`look_first` before work: only its warnings are shown, on stderr."""
    for line in look_first(experiment, dumps=dumps):
        if line.startswith("warning: "):
            print(f"stillhouse: {line}", file=sys.stderr)


def check_places(experiment: Experiment) -> None:
    """ConfigError for a folder that will be written to and cannot be."""
    check_writable(experiment.run, field="runs_dir/name")
    check_writable(experiment.run / "logs", field="the folder of logs")
    if not is_url(experiment.cache.path):
        check_writable(experiment.cache.path, field="cache.path")
    if experiment.data.extracted is not None:
        check_writable(experiment.data.extracted, field="data.extracted")
    for name, stage in experiment.stages.items():
        check_writable(resolved(stage, name).output, field=f"stages.{name}.output")


def check_gpus(experiment: Experiment) -> str:
    """A line on GPUs. ConfigError where a run asks for more than there are, on this machine alone."""
    _check_collectives(experiment)
    if not is_alone(experiment.dump.ray_address):
        address = experiment.dump.ray_address or os.environ["RAY_ADDRESS"]
        return f"GPUs: not looked at, Ray's cluster at {address} may have, or get, what is asked for"
    there, wanted = count_gpus(), experiment.ablations.gpus_per_run
    if wanted is not None and experiment.ablations.runs:
        refuse_more_gpus(wanted, there, field="ablations.gpus_per_run")
    return f"GPUs: {there} on this machine"


def _check_collectives(experiment: Experiment) -> None:
    """ConfigError for ranks that would train on this machine's GPUs with a PyTorch that has no nccl."""
    import torch

    several = [name for name, stage in experiment.stages.items() if stage.num_processes > 1]
    if several and torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        raise ConfigError(
            f"stages.{several[0]}.num_processes is {experiment.stages[several[0]].num_processes}, but this PyTorch "
            "has no nccl, through which ranks on GPUs meet; install a build with it, or set num_processes to 1"
        )


def check_stage(experiment: Experiment, name: str) -> None:
    """What `train` looks at before it starts processes. ConfigError: no such init, an output that cannot be written."""
    stage = resolved(experiment.stage(name, asked_by="--stage"), name)
    if stage.compose is None and not Path(stage.init).is_dir() and not is_hub_id(stage.init):
        raise ConfigError(
            f"{experiment.path}: stages.{name}.init is {stage.init}: there is no such folder, and a hub id is "
            "owner/name"
        )
    check_writable(stage.output, field=f"stages.{name}.output")


def needs(experiment: Experiment) -> list[Need]:
    """What is known of the bytes that are still to be written: checkpoints by their inits, a cache by what it has.

    What exists is replaced file by file, and so counts as nothing. Inits that are not there yet count as nothing too.
    """
    found, sizes = [], {}
    stages = [(run.label, run.section, run.folder, run.parent) for run in grid(experiment)]
    if experiment.train_teacher is not None:
        name = experiment.train_teacher.stage
        stage = resolved(experiment.stages[name], name)
        stages.insert(0, (name, stage, Path(stage.output), None))
    for label, stage, folder, parent in stages:
        init = parent or Path(stage.init.replace("{seed}", str(stage.seed)))
        num_weights = sizes[folder] = sizes.get(init) or count_weights(init)
        if not num_weights or any(folder.glob("*.safetensors")):
            continue
        found.append(Need(folder, num_weights * _ITEM_BYTES[stage.precision], f"the checkpoint of {label}", "least"))
        if stage.save_every is not None:
            size = num_weights * _STATE_BYTES * (stage.keep_states + 1)
            found.append(Need(folder, size, f"states of {label}", "for a while"))
    return [*found, *_need_of_cache(experiment)]


def count_weights(folder: Path) -> int:
    """The elements of a checkpoint's tensors; 0 where there is none yet, or none that can be read."""
    try:
        headers = [read_header(path) for path in weight_files(folder)]
    except (StillhouseError, OSError):
        return 0
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


def check_room(asked: Sequence[Need], run: Path) -> Iterator[str]:
    """A line a disk: what is free and what is needed, as far as that is known. ConfigError: certainly too little.

    `run`: the folder whose disk is told of in any case.
    """
    disks: dict[int, list[Need]] = {_device(run): []}
    for need in asked:
        disks.setdefault(_device(need.place), []).append(need)
    for group in disks.values():
        place = group[0].place if group else run
        free = measure_free_bytes(place)
        if free is None:
            continue
        line = f"the disk of {place} has {format_bytes(free)} free"
        least = sum(need.num_bytes for need in group if need.kind == "least")
        if least > free:
            raise ConfigError(
                f"{line}, and at least {format_bytes(least)} will be written there ({_shown(group)}); free space "
                "there, or give another runs_dir"
            )
        about = least + sum(need.num_bytes for need in group if need.kind == "about")
        about += max((need.num_bytes for need in group if need.kind == "for a while"), default=0)
        line += (
            f", and about {format_bytes(about)} or more will be written ({_shown(group)})"
            if group
            else ("; how much will be written is not known yet")
        )
        yield f"warning: {line}" if about > free else f"disk: {line}"


def _device(path: Path) -> int:
    return find_existing_parent(path).stat().st_dev


def _shown(needs: Sequence[Need]) -> str:
    largest = sorted(needs, key=lambda need: -need.num_bytes)
    names = [f"{need.what} {format_bytes(need.num_bytes)}" for need in largest[:3]]
    return ", ".join([*names, f"{len(needs) - 3} more"] if len(needs) > 3 else names)


def _need_of_cache(experiment: Experiment) -> Iterator[Need]:
    """The parts that a cache lacks, as large as those that it has; without any what `stillhouse plan` has forecast."""
    path = experiment.cache.path
    if is_url(path):
        return
    if has_cache(open_folder(path)):
        cache = Cache.open(path, families=())
        missing = cache.identity.num_parts - cache.num_parts
        if not cache.sealed and cache.num_parts and missing > 0:
            size = int(cache.statistics()["bytes"]) * missing // cache.num_parts
            yield Need(Path(path), size, f"the {missing:,} parts that the cache lacks", "about")
            return
    elif (forecast := _read_forecast(experiment.run)) is not None:
        what = f"the cache of {forecast['samples']:,} samples, by the forecast of `stillhouse plan`"
        yield Need(Path(path), forecast["bytes"], what, "about")


def keep_forecast(run: Path, *, num_samples: int, num_bytes: int) -> None:
    """Remembers in the run's folder what a cache is expected to weigh. WriteError: a full disk, for one."""
    document = {"samples": num_samples, "bytes": num_bytes}
    write_atomically(run / _FORECAST, f"{json.dumps(document)}\n".encode())


def _read_forecast(run: Path) -> dict[str, int] | None:
    try:
        found = json.loads((run / _FORECAST).read_bytes())
        return {name: int(found[name]) for name in ("samples", "bytes")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_splits(experiment: Experiment) -> None:
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


def check_inits(experiment: Experiment) -> None:
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
            if images is not None and not Path(images).is_dir() and not may_be_prepared(experiment, images):
                raise ConfigError(f"{experiment.path}: {place}.images is {images}: there is no such folder")
    outputs = {Path(stage.output) for stage in stages.values()}
    for name, stage in stages.items():
        place = Path(stage.init)
        made = may_be_prepared(experiment, place) or place in outputs or stage.compose is not None
        if not (place.is_dir() or made or is_hub_id(stage.init)):
            raise ConfigError(
                f"{experiment.path}: stages.{name}.init is {stage.init}: there is no such folder, no stage writes it, "
                "and a hub id is owner/name"
            )


def _sources(name: str, stage: StageSection, cache_path: str) -> Iterator[tuple[str, SourceSection]]:
    """What a stage trains on, with the place in the file where it says so."""
    for number, source in enumerate(stage.sources(cache_path)):
        yield f"stages.{name}" if stage.caches is None else f"stages.{name}.caches.{number}", source


def may_be_prepared(experiment: Experiment, place: str | Path) -> bool:
    """Whether the script of `prepare` may make a place: it writes into the run's folder."""
    return experiment.prepare is not None and Path(place).is_relative_to(experiment.run)
