"""Reads the tensors of a foreign checkpoint: names and shapes first, then one tensor at a time.

Files are safetensors, or what torch.save wrote. The latter are read with weights_only=True, which refuses every object
but tensors, and mapped into memory, so that a tensor takes memory only while it is copied.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightFile:
    """One file of weights. `prefix` is put before the names in it: files of parts leave it out."""

    path: Path
    prefix: str = ""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file, without its values."""

    name: str  # with the file's prefix
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: WeightFile

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def list_weight_files(folder: Path, *, prefix: str = "") -> tuple[WeightFile, ...]:
    """List a folder's weight files; safetensors first. ConfigError if it has none, or lacks one of its index."""
    for name in INDEXES:
        if (folder / name).is_file():
            return tuple(WeightFile(path, prefix) for path in _read_index(folder / name))
    for name in WHOLE:
        if (folder / name).is_file():
            return (WeightFile(folder / name, prefix),)
    raise ConfigError(
        f"{folder}: no weights are here; expected one of {', '.join((*INDEXES, *WHOLE))}; give a complete checkpoint"
    )


def _read_index(path: Path) -> list[Path]:
    names = set(read_json(path).get("weight_map", {}).values())
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigError(f"{path}: its weight_map does not name files of its own folder; give a complete checkpoint")
    files = [path.parent / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{path.parent}: lacks {', '.join(missing)}, which {path.name} names; copy the missing files")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. ConfigError if it is missing or broken."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a complete checkpoint") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}; give a complete checkpoint") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: got a JSON {type(document).__name__}, expected an object")
    return document


def list_tensors(files: tuple[WeightFile, ...]) -> list[SourceTensor]:
    """List the tensors of all files, without reading values. ConfigError for a broken file and a repeated name."""
    found: dict[str, SourceTensor] = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.names:
                shape, dtype = tensors.describe(name)
                tensor = SourceTensor(file.prefix + name, name, shape, dtype, file)
                _check_float(tensor)
                if tensor.name in found:
                    first = found[tensor.name].file.path
                    raise ConfigError(f"{file.path}: tensor {tensor.name} is also in {first}; remove one of the files")
                found[tensor.name] = tensor
    return list(found.values())


def _check_float(tensor: SourceTensor) -> None:
    if tensor.dtype not in FLOATS and not tensor.name.endswith(".position_ids"):
        raise ConfigError(
            f"{tensor.file.path}: tensor {tensor.name} has dtype {tensor.dtype}, expected a floating-point one; "
            "quantised weights cannot be mapped: give the checkpoint in its original precision"
        )


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.names: list[str] = list(handle.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        part = self._handle.get_slice(name)
        return tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.uint8)

    def load(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


class _Pickled:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.names: list[str] = list(tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def load(self, name: str) -> Tensor:
        return self._tensors[name]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
OpenTensors = _Safetensors | _Pickled


@contextmanager
def open_tensors(file: WeightFile) -> Iterator[OpenTensors]:
    """Open one file of weights; tensors are valid within the context. ConfigError for a file that is not one."""
    if file.path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(file.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file.path}: is not a whole safetensors file: {error}; copy it again") from error
        with handle as opened:
            yield _Safetensors(opened)
        return
    yield _Pickled(_load_pickled(file.path))


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = _load_tensors_only(path)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path}: holds Python objects besides tensors, which could run code and are not read; give a file of "
            "tensors alone, such as safetensors"
        ) from error
    except Exception as error:  # whatever torch raises for a file that it did not write
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"{path}: is not a whole file of torch.save: {first_line}; copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        others = (
            [key for key, value in content.items() if not isinstance(value, Tensor)]
            if isinstance(content, dict)
            else []
        )
        got = f"no tensor under {others[0]!r}" if others else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: holds {got}, expected tensors by name; give a file of weights alone")
    return content


def _load_tensors_only(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual pickles, which are refused anyway
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
