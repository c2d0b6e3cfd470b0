"""Recognises a checkpoint's format by the keys of its config.json and the names of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.conversion import gguf_decoder, llava, moe_llava, tinyllava
from stillhouse.conversion.conversion import Conversion, Options
from stillhouse.conversion.source_tensors import read_json
from storage.errors import ConfigError
from student_train.models.huggingface import import_transformers

Name = Literal["tinyllava", "llava", "moe_llava", "gguf"]
READERS: dict[str, Callable[[Path, Mapping[str, Any], Options], Conversion]] = {
    tinyllava.NAME: tinyllava.read,
    llava.NAME: llava.read,
    moe_llava.NAME: moe_llava.read,
}
_KNOWN = f"""known formats:
  TinyLLaVA Factory, LLaVA-KD: config.json with model_type tinyllava and connector_type
  LLaVA: model_type {", ".join(llava.DECODERS)} with mm_vision_tower; or mm_projector.bin beside such a config.json
  MoE-LLaVA, LLaVA-MoD: model_type {", ".join(moe_llava.DECODERS)} with moe
  GGUF: a file that ends with .gguf, or a folder with one such file"""


@dataclass(frozen=True)
class Detected:
    """A source's format, its config.json (empty for GGUF), and the GGUF file or the folder."""

    format: Name
    path: Path
    config: Mapping[str, Any]


def detect_format(source: Path) -> Detected:
    """Return the format of a checkpoint. ConfigError saying what was found and which formats are known."""
    if not source.exists():
        raise ConfigError(f"SOURCE {source} does not exist; give a folder or a .gguf file on this machine")
    if source.is_file():
        if source.suffix != ".gguf":
            raise ConfigError(f"SOURCE {source} is a file but no .gguf; give the checkpoint's folder\n{_KNOWN}")
        return Detected("gguf", source, {})
    if not (source / "config.json").is_file():
        files = sorted(source.glob("*.gguf"))
        if len(files) == 1:
            return Detected("gguf", files[0], {})
        found = ", ".join(sorted(path.name for path in source.iterdir())[:12]) or "nothing"
        several = "several .gguf files, of which one must be named" if files else "no config.json"
        raise ConfigError(f"SOURCE {source}: {several}; it holds {found}\n{_KNOWN}")
    config = read_json(source / "config.json")
    return Detected(_find_format(source, config), source, config)


def _find_format(source: Path, config: Mapping[str, Any]) -> Name:
    kind = config.get("model_type")
    if kind == "tinyllava":
        return "tinyllava"
    if kind in (*moe_llava.DECODERS, *moe_llava.REFUSED):
        return "moe_llava"
    if kind in llava.DECODERS and "mm_vision_tower" in config:
        return "llava"
    got = f"model_type {kind!r}, architectures {config.get('architectures')}"
    if kind in import_transformers().CONFIG_MAPPING:
        raise ConfigError(
            f"SOURCE {source}: {got}: this is transformers' own format, which teacher.model and stages.NAME.init read; "
            "there is nothing to convert"
        )
    keys = ", ".join(sorted(config)[:20])
    raise ConfigError(f"SOURCE {source}: got {got}, with the keys {keys}\n{_KNOWN}")


def list_read_files(detected: Detected) -> list[Path]:
    """List the files of the source that a conversion may read, for its fingerprint."""
    if detected.format == gguf_decoder.NAME:
        return [detected.path]
    suffixes = (".json", ".bin", ".safetensors", ".model", ".txt", ".tiktoken")
    folders = [detected.path, *(path for path in detected.path.iterdir() if path.is_dir() and path.name[0] != ".")]
    return sorted(path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
