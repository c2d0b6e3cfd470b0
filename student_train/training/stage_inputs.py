"""The inputs of a stage as plain JSON: stored with its result and its states, and compared field by field.

Paths, such as those of caches or of `init`, are not inputs: contents decide, so a project that was moved resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.backends.folder import write_json
from storage.field_changes import describe_changes
from student_train.config import SourceSection, StageSection
from student_train.data.mixture import CacheSource
from student_train.models.checkpoint_contents import describe_checkpoint, describe_composition, describe_pruning

if TYPE_CHECKING:  # which imports torch
    from student_train.training.stage_data import StageData

RECORD = "inputs.json"
_PLACES = {
    "init",
    "compose",
    "prune",
    "output",
    "cache",
    "caches",
    "images",
    "splits",
    "filter",
}  # hashed as `init` and `caches`
_IRRELEVANT = {"evaluation_cache", "save_every", "keep_states", "memory_mb", "num_processes", "explosion_factor"}
_PRODUCTS = {"log_every", "track", "checkpoints"}  # change files beside the weights, but not the weights
_IDENTITY_PLACES = {"teacher", "image_root", "num_parts", "selection"}


def collect_stage_inputs(stage: StageSection, stage_data: StageData) -> dict[str, Any]:
    """Collect the inputs of a resolved stage and its data. Reads the files of `init` once."""
    settings = stage.model_dump(mode="json")
    sources = stage.list_sources("")
    return {
        "stage": _drop_fields(settings, _PLACES | _IRRELEVANT | _PRODUCTS),
        "products": {name: settings[name] for name in sorted(_PRODUCTS)},
        "init": describe_checkpoint(stage_data.checkpoint.folder),
        "caches": [
            {
                **describe_samples(source, section),
                "selection": _drop_fields(
                    source.cache.identity.selection, source.cache.identity.selection.keys() - _list_families(stage)
                ),
                "weight": source.weight,
            }
            for source, section in zip(stage_data.mixture.sources, sources, strict=True)
        ],
    }


def describe_samples(source: CacheSource, section: SourceSection) -> dict[str, Any]:
    """Describe the samples that a stage takes from one cache, and that cache's identity without its selection."""
    return {
        **_drop_fields(source.cache.identity.model_dump(mode="json"), _IDENTITY_PLACES),
        "splits": list(section.splits or ()),
        "filter": [list(condition) for condition in section.filter or ()],
        "num_samples": len(source.indices),
        "samples": hashlib.sha256(np.ascontiguousarray(source.indices).tobytes()).hexdigest(),
    }


def collect_init_inputs(stage: StageSection, place: str) -> dict[str, Any]:
    """Describe a stage's initial checkpoint; the same before and after it is composed or pruned.

    `place`: init, resolved. The samples that `least_change` measures on are those of the stage's caches, which are
    inputs of the stage anyway.
    """
    if stage.compose is not None:
        return describe_composition(stage.compose, seed=stage.seed)
    if stage.prune is not None:
        return describe_pruning(stage.prune)
    return describe_checkpoint(place)


def compare_state_inputs(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """Return the differing fields that decide what stage `name` computes, with both values."""
    return [
        *describe_changes(_add_defaults(old.get("stage")), new["stage"], f"stages.{name}"),
        *describe_changes(old.get("init"), new["init"], "init"),
        *_compare_caches(old.get("caches"), new["caches"]),
    ]


def compare_result_inputs(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """Return the differing fields that decide the weights of stage `name` or files beside them."""
    products = describe_changes(old.get("products"), new["products"], f"stages.{name}")
    return [*compare_state_inputs(old, new, name), *products]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the inputs that a stage's folder records; None if it records none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_record(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Record a stage's inputs in its folder."""
    write_json(folder / RECORD, inputs)


def _compare_caches(old: Any, new: list[Any]) -> list[str]:
    if isinstance(old, list) and len(old) == len(new) == 1:
        return describe_changes(old[0], new[0], "cache")
    if isinstance(old, list) and len(old) != len(new):
        return [f"caches: were {len(old)}, are {len(new)}"]
    return describe_changes(old, new, "caches")


def _add_defaults(settings: Any) -> Any:
    """Add defaults for fields that the version that saved these settings did not have."""
    if not isinstance(settings, dict):
        return settings
    fields = StageSection.model_construct().model_dump(mode="json")
    return _drop_fields(fields, _PLACES | _IRRELEVANT | _PRODUCTS) | settings


def _list_families(stage: StageSection) -> set[str]:
    from student_train.training.stage_data import list_loss_families

    return {"tokens", *list_loss_families(stage.losses)}


def _drop_fields(document: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}
