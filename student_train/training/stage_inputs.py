"""What a stage is made from, as plain JSON: kept beside its result and in its states, and compared field by field.

Places are left out, such as the path of a cache or of `init`: contents decide, so a project that moved resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.field_changes import changed_fields
from student_train.config import CompositionSection, StageSection
from student_train.training.run_files import write_json

if TYPE_CHECKING:  # which imports torch
    from student_train.training.stage_data import Material

RECORD = "inputs.json"
_PLACES = {"init", "compose", "output", "cache", "caches", "images", "splits", "filter"}  # see `init` and `caches`
_NO_MATTER = {"save_every", "keep_states", "memory_mb", "num_processes", "explosion_factor"}
_PRODUCTS = {"log_every", "track", "checkpoints"}  # no weight depends on them, but what lies beside the weights
_IDENTITY_PLACES = {"teacher", "image_root", "num_parts", "selection"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_PROCESSOR = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


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


def checkpoint_inputs(place: str | Path) -> dict[str, Any]:
    """What a checkpoint is, by the content of its files; a hub id stands for itself.

    What other commands write beside a checkpoint (evaluation.json, logs) does not count.
    """
    folder = Path(place)
    if not folder.is_dir():
        return {"name": str(place)}
    return {
        "weights": _hash_files(folder, _WEIGHTS),
        "config": _hash_config(folder / "config.json"),
        "processor": _hash_files(folder, _PROCESSOR),
    }


def composition_inputs(section: CompositionSection, *, seed: int) -> dict[str, Any]:
    """What a composed checkpoint is made from: settings, seed of the projector, content of the parts."""
    parts = {"vision": section.vision, "llm": section.llm}
    return {
        **_without(section.model_dump(mode="json"), {"vision", "llm", "processor"}),
        "seed": seed,
        **{name: _without(checkpoint_inputs(place), {"processor"}) for name, place in parts.items()},
        "processor": _without(checkpoint_inputs(section.processor), {"weights", "config"}),
    }


def init_inputs(stage: StageSection, place: str) -> dict[str, Any]:
    """What a stage starts from, the same before and after a composed checkpoint is made. `place`: init, resolved."""
    if stage.compose is not None:
        return composition_inputs(stage.compose, seed=stage.seed)
    return checkpoint_inputs(place)


def changes_of_state(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """The fields that decide what stage `name` computes and that differ, with both values."""
    return [
        *changed_fields(_with_defaults(old.get("stage")), new["stage"], f"stages.{name}"),
        *changed_fields(old.get("init"), new["init"], "init"),
        *_changed_caches(old.get("caches"), new["caches"]),
    ]


def changes_of_result(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    """The same, and what a finished stage would have written besides its weights."""
    products = changed_fields(old.get("products"), new["products"], f"stages.{name}")
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
        return changed_fields(old[0], new[0], "cache")
    if isinstance(old, list) and len(old) != len(new):
        return [f"caches: were {len(old)}, are {len(new)}"]
    return changed_fields(old, new, "caches")


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


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    yield from sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in _files(folder, patterns):
        digest.update(f"{path.name} {_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_config(path: Path) -> str:
    """Of config.json, but for the version of transformers that wrote it."""
    try:
        document = json.loads(path.read_bytes())
        document.pop("transformers_version", None)
    except (OSError, ValueError, AttributeError):
        return ""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    stat = path.stat()
    return _hash_known_file(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hash_known_file(path: Path, _size: int, _time_ns: int) -> str:
    """A grid asks for the same start many times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
