"""What a stage is made from, as plain JSON: kept beside its result and in its states, and compared field by field.

Places are left out, such as the path of a cache or of `init`: contents decide, so a project that moved resumes.
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
from student_train.config import StageSection
from student_train.models.checkpoint_contents import checkpoint_inputs, composition_inputs

if TYPE_CHECKING:  # which imports torch
    from student_train.training.stage_data import Material

RECORD = "inputs.json"
_PLACES = {"init", "compose", "output", "cache", "caches", "images", "splits", "filter"}  # see `init` and `caches`
_NO_MATTER = {"save_every", "keep_states", "memory_mb", "num_processes", "explosion_factor"}
_PRODUCTS = {"log_every", "track", "checkpoints"}  # no weight depends on them, but what lies beside the weights
_IDENTITY_PLACES = {"teacher", "image_root", "num_parts", "selection"}


def stage_inputs(stage: StageSection, material: Material) -> dict[str, Any]:
    """Of a resolved stage and the data that it trains on. Reads the files of `init` once."""
    settings = stage.model_dump(mode="json")
    sources = stage.sources("")
    return {
        "stage": _without(settings, _PLACES | _NO_MATTER | _PRODUCTS),
        "products": {name: settings[name] for name in sorted(_PRODUCTS)},
        "init": checkpoint_inputs(material.checkpoint.folder),
        "caches": [
            {
                **_without(source.cache.identity.model_dump(mode="json"), _IDENTITY_PLACES),
                "selection": _without(
                    source.cache.identity.selection, source.cache.identity.selection.keys() - _families(stage)
                ),
                "weight": source.weight,
                "splits": list(section.splits or ()),
                "filter": [list(condition) for condition in section.filter or ()],
                "num_samples": len(source.indices),
                "samples": hashlib.sha256(np.ascontiguousarray(source.indices).tobytes()).hexdigest(),
            }
            for source, section in zip(material.data.sources, sources, strict=True)
        ],
    }


def init_inputs(stage: StageSection, place: str) -> dict[str, Any]:
    """What a stage starts from, the same before and after a composed checkpoint is made. `place`: init, resolved."""
    if stage.compose is not None:
        return composition_inputs(stage.compose, seed=stage.seed)
    return checkpoint_inputs(place)


def changes_of_state(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """The fields that decide what stage `name` computes and that differ, with both values."""
    return [
        *describe_changes(_with_defaults(old.get("stage")), new["stage"], f"stages.{name}"),
        *describe_changes(old.get("init"), new["init"], "init"),
        *_changed_caches(old.get("caches"), new["caches"]),
    ]


def changes_of_result(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """The same, and what a finished stage would have written besides its weights."""
    products = describe_changes(old.get("products"), new["products"], f"stages.{name}")
    return [*changes_of_state(old, new, name), *products]


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a stage's folder says that it was made from; None if it says nothing."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_record(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Say in a stage's folder what it is made from."""
    write_json(folder / RECORD, inputs)


def _changed_caches(old: Any, new: list[Any]) -> list[str]:
    if isinstance(old, list) and len(old) == len(new) == 1:
        return describe_changes(old[0], new[0], "cache")
    if isinstance(old, list) and len(old) != len(new):
        return [f"caches: were {len(old)}, are {len(new)}"]
    return describe_changes(old, new, "caches")


def _with_defaults(settings: Any) -> Any:
    """Settings that an earlier version saved, with the defaults of fields that it did not have."""
    if not isinstance(settings, dict):
        return settings
    fields = StageSection.model_construct().model_dump(mode="json")
    return _without(fields, _PLACES | _NO_MATTER | _PRODUCTS) | settings


def _families(stage: StageSection) -> set[str]:
    from student_train.training.stage_data import loss_families

    return {"tokens", *loss_families(stage.losses)}


def _without(document: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}
