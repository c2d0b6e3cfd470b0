"""A teacher's checkpoint folder: its files, its settings, and a view of it that vLLM can serve.

transformers 5 saves the vision tower of a LLaVA as `vision_tower.*`; vLLM, like older transformers, expects
`vision_tower.vision_model.*`. The view is a folder of symbolic links; only the shards with such tensors are
rewritten, with the same data behind another header.

safetensors layout: u64 little-endian header length, JSON header, data. Source: the safetensors README.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.backends.disk import explain_write_errors
from storage.errors import ConfigError, StillhouseError

_INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # bytes; the limit of safetensors itself
_TOWER = re.compile(r"^(?:model\.)?vision_tower\.(?!vision_model\.)")
_NESTED_TOWERS = ("siglip_vision_model", "clip_vision_model")  # for which vLLM has the inner `vision_model`
_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def resolve_checkpoint(model: str, revision: str | None, *, with_weights: bool) -> Path:
    """Returns the folder of a checkpoint; downloads a Hub id (safetensors only)."""
    folder = Path(model)
    if folder.is_dir():
        if with_weights and not (folder / "config.json").is_file():
            raise ConfigError(f"teacher.model: no checkpoint is in the folder {model} (config.json is missing)")
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"teacher.model: {model} is neither a folder nor a Hub id such as llava-hf/llava-1.5-7b-hf")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if with_weights else [])
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"teacher.model: {model} is not a local folder and cannot be downloaded from the Hub: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint. Raises StillhouseError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StillhouseError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StillhouseError(f"{path}: is {type(value).__name__}, expected an object")
    return value


def get_text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the language model's settings in a config.json: `text_config` overrides the outer ones."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def get_context_length(config: Mapping[str, Any]) -> int | None:
    """Returns the maximal number of positions of the language model; None if the config has none."""
    value = get_text_settings(config).get("max_position_embeddings")
    return value if isinstance(value, int) else None


def read_saved_dtype(folder: Path) -> str:
    """Returns `float32`, `bfloat16` or `float16`: the config's dtype, else that of most weights."""
    settings = get_text_settings(read_json(folder / "config.json"))
    for key in ("dtype", "torch_dtype"):
        if settings.get(key) in _DTYPES.values():
            return settings[key]
    kinds: dict[str, int] = {}
    for path in list_weight_files(folder):
        for tensor in read_header(path).values():
            name = _DTYPES.get(tensor.get("dtype", ""), "float32")
            first, last = tensor.get("data_offsets", (0, 0))
            kinds[name] = kinds.get(name, 0) + last - first
    return max(kinds, key=lambda name: kinds[name]) if kinds else "float32"


def list_weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors shards of a checkpoint, sorted. Raises StillhouseError if there are none.

    Pickles are not read.
    """
    if (folder / _INDEX).is_file():
        names = set(read_json(folder / _INDEX).get("weight_map", {}).values())
        if any(Path(name).name != name for name in names):
            raise StillhouseError(f"{folder / _INDEX}: a shard lies outside of the folder")
        files = [folder / name for name in sorted(names)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "has no safetensors weights"
        raise StillhouseError(f"{folder}: {what}")
    return files


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads dtype, shape and data offsets of the tensors in a safetensors file, by name."""
    return {name: entry for name, entry in _read_raw_header(path)[0].items() if name != "__metadata__"}


def map_tensor_files(folder: Path) -> dict[str, Path]:
    """Maps each tensor of a checkpoint to its shard."""
    return {name: path for path in list_weight_files(folder) for name in read_header(path)}


def make_servable_view(folder: Path, *, into: Path) -> Path:
    """Returns a folder that vLLM can serve: `folder` itself if its names fit, else a view below `into`.

    The view's name is a hash of the path, sizes and times of the checkpoint's files, and the view appears
    atomically, so any number of processes may make it.
    """
    vision = read_json(folder / "config.json").get("vision_config")
    if not isinstance(vision, dict) or vision.get("model_type") not in _NESTED_TOWERS:
        return folder
    shards = [path for path in list_weight_files(folder) if any(_TOWER.match(name) for name in read_header(path))]
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir())]
    name = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()[:16]
    view = into / name
    if not shards or view.is_dir():
        return view if shards else folder
    temporary = into / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    with explain_write_errors(into):
        temporary.mkdir(parents=True)
        _fill_view(folder, shards, view, temporary)
    return view


def _fill_view(folder: Path, shards: list[Path], view: Path, temporary: Path) -> None:
    """Fills `temporary` and renames it to `view`, unless another process was first."""
    try:
        for path in folder.iterdir():
            if path in shards:
                _copy_renamed(path, temporary / path.name)
            elif path.name == _INDEX:
                index = read_json(path)
                index["weight_map"] = {_rename_tower(name): file for name, file in index["weight_map"].items()}
                (temporary / path.name).write_text(json.dumps(index, indent=1), encoding="utf-8")
            else:
                (temporary / path.name).symlink_to(path.resolve())
        temporary.rename(view)
    except OSError:
        if not view.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_tower(name: str) -> str:
    return _TOWER.sub(lambda match: f"{match.group(0)}vision_model.", name)


def _copy_renamed(source: Path, target: Path) -> None:
    header, length = _read_raw_header(source)
    text = json.dumps({_rename_tower(name): entry for name, entry in header.items()}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data stays aligned, as safetensors writes it
    with source.open("rb") as reader, target.open("xb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        reader.seek(8 + length)
        shutil.copyfileobj(reader, writer, 16 * 2**20)
        writer.flush()
        os.fsync(writer.fileno())


def _read_raw_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise StillhouseError(f"{path}: is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise StillhouseError(f"{path}: is not a safetensors file: its header is not an object")
    return header, length
