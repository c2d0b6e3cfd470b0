"""Describes checkpoints and what they are made from as plain JSON, by content hashes of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from student_train.config import TEMPLATES, CompositionSection, PruneSection

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_PROCESSOR = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def describe_checkpoint(place: str | Path) -> dict[str, Any]:
    """Describe a checkpoint by content hashes of its files; a Hub id by itself.

    Ignores what other commands write beside a checkpoint (evaluation.json, logs).
    """
    folder = Path(place)
    if not folder.is_dir():
        return {"name": str(place)}
    return {
        "weights": _hash_files(folder, _WEIGHTS),
        "config": _hash_config(folder / "config.json"),
        "processor": _hash_files(folder, _PROCESSOR),
    }


def describe_composition(section: CompositionSection, *, seed: int) -> dict[str, Any]:
    """Describe what a composed checkpoint is made from: settings, projector seed, content of the parts."""
    parts = {"vision": describe_checkpoint(section.vision), "llm": describe_checkpoint(section.llm)}
    layer = -2 if section.feature_layer is None else section.feature_layer
    if section.processor is not None:
        processor = _drop_fields(describe_checkpoint(section.processor), {"weights", "config"})
    else:
        template = hashlib.sha256(read_template(section).encode()).hexdigest()
        of_parts = {name: contents.get("processor", contents.get("name")) for name, contents in parts.items()}
        processor = {**of_parts, "template": template, "pad_to_square": section.pad_to_square}
    return {
        **section.model_dump(mode="json", exclude={"vision", "llm", "processor", "template", "pad_to_square"}),
        "feature_layer": layer,
        "seed": seed,
        **{name: _drop_fields(contents, {"processor"}) for name, contents in parts.items()},
        "processor": processor,
    }


def get_shipped_template(name: str) -> Path:
    """Return the file of one of TEMPLATES."""
    return Path(__file__).with_name("templates") / f"{name}.jinja"


def read_template(section: CompositionSection) -> str:
    """Return the text of a composition's chat template: a shipped one or a file. Errors: ConfigError."""
    assert section.template is not None
    path = get_shipped_template(section.template) if section.template in TEMPLATES else Path(section.template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"compose.template: {path} cannot be read: {error}; give {', '.join(TEMPLATES)} or a .jinja file"
        ) from error


def describe_pruning(section: PruneSection) -> dict[str, Any]:
    """Describe what a pruned checkpoint is made from: settings that matter and the content of the whole model."""
    unused = {"model"} if section.measures_change else {"model", "slice"}
    if not isinstance(section.layers, int):
        unused.add("choose")
    return {**section.model_dump(mode="json", exclude=unused), "model": describe_checkpoint(section.model)}


def _drop_fields(document: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


def _iterate_files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    yield from sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in _iterate_files(folder, patterns):
        digest.update(f"{path.name} {_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_config(path: Path) -> str:
    """Hash config.json, ignoring the version of transformers that wrote it; empty if it cannot be read."""
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
    """Hash a file; cached, since an ablation hashes the same checkpoint many times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
