"""Checks names, paths, disk space, GPUs and the machine: first in `check`, and in `run` and `ablate` before they start.

It reads no data and loads no model, and takes about a second. It refuses what would certainly fail and warns of what
may run short, such as disk space.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stillhouse.ablate import check_round_caches, list_grid
from stillhouse.checkpoint_sizes import count_pruned_weights, count_weights
from stillhouse.config import Experiment
from storage.backends.disk import check_writable, find_existing_parent, format_bytes, measure_free_bytes
from storage.backends.folder import is_url, open_folder, write_atomically
from storage.errors import ConfigError
from storage.layout.segments import has_cache
from storage.reader.cache import Cache
from student_train.config import SourceSection, StageSection
from student_train.models.loading import is_hub_id
from student_train.training.init_making import list_init_parts
from student_train.training.trainer import resolve_stage
from teacher_dump.execution.machine import check_dump_machine, check_gpu_count, check_machine, count_gpus, is_local_ray
from teacher_dump.settings import read_settings

_FORECAST = "forecast.json"
_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a weight in a checkpoint
_PARTS = ("vision", "llm", "processor")  # checkpoints that a composition names
_STATE_BYTES = 12  # of a weight that trains: float32 copy and two moments


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that will be written below a path."""

    path: Path
    num_bytes: int
    description: str
    kind: Literal["least", "about", "temporary"]  # a lower bound, an estimate, or an estimate until training ends


def check_preconditions(experiment: Experiment, *, dumps: bool = True) -> Iterator[str]:
    """Yields a line for each result, warnings included. ConfigError for what would certainly fail.

    `dumps` says that the dump will run, so its machine is checked too.
    """
    check_splits(experiment)
    check_inits(experiment)
    check_round_caches(experiment)
    check_output_folders(experiment)
    yield check_gpus(experiment)
    yield from check_disk_space(estimate_disk_needs(experiment), experiment.run)
    trains = any(not (run.folder / "evaluation.json").exists() for run in list_grid(experiment))
    warnings = check_dump_machine(read_settings(experiment.path, experiment.overrides)) if dumps else []
    for run in list_grid(experiment):
        if run.round_cache is not None and not (run.folder / "evaluation.json").exists():
            warnings += check_dump_machine(
                read_settings(experiment.path, (*experiment.overrides, *run.round_overrides))
            )
    if trains:  # Ray runs the trainings
        warnings += check_machine(runs_vllm=False, ray_address=experiment.dump.ray_address)
    yield from (f"warning: {line}" for line in dict.fromkeys(warnings))


def print_warnings(experiment: Experiment, *, dumps: bool = True) -> None:
    """Runs `check_preconditions` and prints its warnings to stderr."""
    for line in check_preconditions(experiment, dumps=dumps):
        if line.startswith("warning: "):
            print(f"stillhouse: {line}", file=sys.stderr)


def check_output_folders(experiment: Experiment) -> None:
    """ConfigError for a folder that the experiment writes to and cannot be written."""
    check_writable(experiment.run, field="runs_dir/name")
    check_writable(experiment.run / "logs", field="the folder of logs")
    if not is_url(experiment.cache.path):
        check_writable(experiment.cache.path, field="cache.path")
    if experiment.data.extracted is not None:
        check_writable(experiment.data.extracted, field="data.extracted")
    for name, stage in experiment.stages.items():
        check_writable(resolve_stage(stage, name).output, field=f"stages.{name}.output")


def check_gpus(experiment: Experiment) -> str:
    """A line with the number of GPUs. ConfigError where a run needs more than this machine has, without a cluster."""
    _check_nccl(experiment)
    if not is_local_ray(experiment.dump.ray_address):
        address = experiment.dump.ray_address or os.environ["RAY_ADDRESS"]
        return f"GPUs: not checked, since Ray's cluster at {address} may have or start as many as a run needs"
    num_gpus, wanted = count_gpus(), experiment.ablations.gpus_per_run
    if wanted is not None and experiment.ablations.runs:
        check_gpu_count(wanted, num_gpus, field="ablations.gpus_per_run")
    return f"GPUs: {num_gpus} on this machine"


def _check_nccl(experiment: Experiment) -> None:
    """ConfigError if a stage needs several ranks on GPUs and this PyTorch has no nccl."""
    parallel = [name for name, stage in experiment.stages.items() if stage.num_processes > 1]
    if parallel and torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        raise ConfigError(
            f"stages.{parallel[0]}.num_processes is {experiment.stages[parallel[0]].num_processes}, but this PyTorch "
            "has no nccl, by which ranks on GPUs communicate; install a build with it, or set num_processes to 1"
        )


def check_stage_inputs(experiment: Experiment, name: str) -> None:
    """Checks a stage before `train` starts it. ConfigError if its init is missing or its output cannot be written."""
    stage = resolve_stage(experiment.get_stage(name, named_by="--stage"), name)
    if not list_init_parts(stage) and not Path(stage.init).is_dir() and not is_hub_id(stage.init):
        raise ConfigError(
            f"{experiment.path}: stages.{name}.init is {stage.init}, which is neither a directory nor a Hub id "
            "(owner/name)"
        )
    check_writable(stage.output, field=f"stages.{name}.output")


def estimate_disk_needs(experiment: Experiment) -> list[DiskNeed]:
    """The bytes still to be written, as far as they are known: checkpoints by the sizes of their inits, and the cache.

    Outputs that exist already need no more space. A checkpoint whose init does not exist yet is left out, but for one
    that is pruned from a checkpoint that exists.
    """
    needs: list[DiskNeed] = []
    sizes: dict[Path, int] = {}
    stages = [(run.label, run.section, run.folder, run.parent) for run in list_grid(experiment)]
    if experiment.train_teacher is not None:
        name = experiment.train_teacher.stage
        stage = resolve_stage(experiment.stages[name], name)
        stages.insert(0, (name, stage, Path(stage.output), None))
    for label, stage, folder, parent in stages:
        init = parent or Path(stage.init.replace("{seed}", str(stage.seed)))
        if parent is None and stage.prune is not None and init not in sizes and not init.is_dir():
            sizes[init] = count_pruned_weights(stage.prune)
            size = sizes[init] * min(_ITEM_BYTES.values())
            needs += [DiskNeed(init, size, f"the pruned checkpoint {init.name}", "least")] if size else []
        num_weights = sizes[folder] = sizes.get(init) or count_weights(init)
        if not num_weights or any(folder.glob("*.safetensors")):
            continue
        size = num_weights * _ITEM_BYTES[stage.precision]
        needs.append(DiskNeed(folder, size, f"the checkpoint of {label}", "least"))
        if stage.save_every is not None:
            size = num_weights * _STATE_BYTES * (stage.keep_states + 1)
            needs.append(DiskNeed(folder, size, f"states of {label}", "temporary"))
    return [*needs, *_estimate_cache(experiment)]


def check_disk_space(needs: Sequence[DiskNeed], run: Path) -> Iterator[str]:
    """Yields a line for each disk: free and needed bytes. ConfigError where the space is certainly too small.

    The disk of the folder `run` always has a line.
    """
    by_disk: dict[int, list[DiskNeed]] = {_get_device(run): []}
    for need in needs:
        by_disk.setdefault(_get_device(need.path), []).append(need)
    for group in by_disk.values():
        path = group[0].path if group else run
        free = measure_free_bytes(path)
        if free is None:
            continue
        line = f"the disk of {path} has {format_bytes(free)} free"
        least = sum(need.num_bytes for need in group if need.kind == "least")
        if least > free:
            raise ConfigError(
                f"{line}, and at least {format_bytes(least)} will be written there ({_list_largest(group)}); free "
                "space there, or give another runs_dir"
            )
        about = least + sum(need.num_bytes for need in group if need.kind == "about")
        about += max((need.num_bytes for need in group if need.kind == "temporary"), default=0)
        if group:
            line += f", and about {format_bytes(about)} or more will be written ({_list_largest(group)})"
        else:
            line += "; how much will be written is not known yet"
        yield f"warning: {line}" if about > free else f"disk: {line}"


def _get_device(path: Path) -> int:
    return find_existing_parent(path).stat().st_dev


def _list_largest(needs: Sequence[DiskNeed]) -> str:
    largest = sorted(needs, key=lambda need: -need.num_bytes)
    texts = [f"{need.description} {format_bytes(need.num_bytes)}" for need in largest[:3]]
    return ", ".join([*texts, f"{len(needs) - 3} more"] if len(needs) > 3 else texts)


def _estimate_cache(experiment: Experiment) -> Iterator[DiskNeed]:
    """The missing parts of a cache, by the mean size of its parts, or a new cache by the forecast of `plan`."""
    path = experiment.cache.path
    if is_url(path):
        return
    if has_cache(open_folder(path)):
        cache = Cache.open(path, families=())
        num_missing = cache.identity.num_parts - cache.num_parts
        if not cache.sealed and cache.num_parts and num_missing > 0:
            size = int(cache.statistics()["bytes"]) * num_missing // cache.num_parts
            yield DiskNeed(Path(path), size, f"the {num_missing:,} missing parts of the cache", "about")
    elif (forecast := _read_forecast(experiment.run)) is not None:
        description = f"the cache of {forecast['samples']:,} samples, by the forecast of `stillhouse plan`"
        yield DiskNeed(Path(path), forecast["bytes"], description, "about")


def write_forecast(run: Path, *, num_samples: int, num_bytes: int) -> None:
    """Keeps the forecast size of a cache in the run's folder. WriteError if it cannot be written."""
    document = {"samples": num_samples, "bytes": num_bytes}
    write_atomically(run / _FORECAST, f"{json.dumps(document)}\n".encode())


def _read_forecast(run: Path) -> dict[str, int] | None:
    try:
        document = json.loads((run / _FORECAST).read_bytes())
        return {name: int(document[name]) for name in ("samples", "bytes")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_splits(experiment: Experiment) -> None:
    """ConfigError if a stage, its checkpoint selection or the evaluation names a split that no source has.

    Held-out samples may lie in any cache of a stage.
    """
    data_splits = {source.split for source in experiment.data.sources}
    own_cache = experiment.cache.path
    sources = {name: list(_list_sources(name, stage, own_cache)) for name, stage in experiment.stages.items()}
    named: dict[str, tuple[Sequence[str], set[str]]] = {  # by field: its splits, and those of other caches
        field: (source.splits or (), set())
        for stage_sources in sources.values()
        for field, source in stage_sources
        if source.path == own_cache
    }
    others = {name: _read_splits([source.path for _, source in each], own_cache) for name, each in sources.items()}
    judged = [stage.evaluation_cache for stage in experiment.stages.values() if stage.evaluation_cache is not None]
    for name, stage in experiment.stages.items():
        if stage.checkpoints is not None and any(source.path == own_cache for _, source in sources[name]):
            named[f"stages.{name}.checkpoints"] = stage.checkpoints.splits, others[name]
    if experiment.ablations.runs:  # they are evaluated
        named["evaluation"] = experiment.evaluation.splits, _read_splits(judged, own_cache).union(*others.values())
    for field, (splits, other_splits) in named.items():
        unknown = [split for split in splits if split not in data_splits | other_splits]
        if unknown:
            known = f"data.sources has {', '.join(sorted(data_splits))}"
            if other_splits:
                known += f", other caches {', '.join(sorted(other_splits))}"
            raise ConfigError(f"{experiment.path}: {field}.splits names {', '.join(unknown)}; {known}")


def _read_splits(paths: Sequence[str], own_cache: str) -> set[str]:
    """The splits of all caches at `paths` that exist, without those of the experiment's own cache."""
    existing = [path for path in paths if path != own_cache and has_cache(open_folder(path))]
    return {split for path in existing for split in Cache.open(path, ()).splits}


def check_inits(experiment: Experiment) -> None:
    """ConfigError if a checkpoint, cache or image folder is missing and nothing in the experiment makes it."""
    stages = {name: resolve_stage(section, name) for name, section in experiment.stages.items()}
    made_caches = {experiment.cache.path, *experiment.more_caches}
    if experiment.train_teacher is not None:
        made_caches.add(str(experiment.stages[experiment.train_teacher.stage].cache))
    for name, stage in stages.items():
        sources = list(_list_sources(name, stage, experiment.cache.path))
        suffix = ".cache" if stage.caches is None else ".path"
        named = {f"{field}{suffix}": source.path for field, source in sources}
        if stage.evaluation_cache is not None:
            named[f"stages.{name}.evaluation_cache"] = stage.evaluation_cache
        for field, path in named.items():
            if path not in made_caches and not has_cache(open_folder(path)):
                raise ConfigError(f"{experiment.path}: {field} is {path}: no cache is there, and this file makes none")
        for field, source in sources:
            images = source.images
            if images is not None and not Path(images).is_dir() and not may_be_made_by_prepare(experiment, images):
                raise ConfigError(f"{experiment.path}: {field}.images is {images}: there is no such folder")
    made = list_made_checkpoints(experiment)
    for name, stage in stages.items():
        named = {f"stages.{name}.init": stage.init}
        if stage.prune is not None:
            named[f"stages.{name}.prune.model"] = stage.prune.model
        if stage.compose is not None:
            parts = {part: getattr(stage.compose, part) for part in _PARTS}
            named |= {f"stages.{name}.compose.{part}": path for part, path in parts.items() if path is not None}
        for field, path in named.items():
            is_made = may_be_made_by_prepare(experiment, path) or Path(path) in made
            if not (Path(path).is_dir() or is_made or is_hub_id(path)):
                raise ConfigError(
                    f"{experiment.path}: {field} is {path}, which is neither a directory, nor the output of a stage, "
                    "nor made for one by compose or prune, nor a Hub id (owner/name)"
                )


def list_made_checkpoints(experiment: Experiment) -> set[Path]:
    """The checkpoints that stages make: their outputs, and inits that they compose or prune."""
    stages = [resolve_stage(section, name) for name, section in experiment.stages.items()]
    inits = {Path(stage.init) for stage in stages if list_init_parts(stage)}
    return {Path(stage.output) for stage in stages} | inits


def _list_sources(name: str, stage: StageSection, cache_path: str) -> Iterator[tuple[str, SourceSection]]:
    """The caches that a stage trains on, each with the field that names it."""
    for number, source in enumerate(stage.list_sources(cache_path)):
        yield f"stages.{name}" if stage.caches is None else f"stages.{name}.caches.{number}", source


def may_be_made_by_prepare(experiment: Experiment, path: str | Path) -> bool:
    """Whether the script of `prepare` may make a path: it writes below the run's folder."""
    return experiment.prepare is not None and Path(path).is_relative_to(experiment.run)
