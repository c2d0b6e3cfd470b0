"""Decides, before any weights are read, which tensor of the source becomes which tensors of the target.

The target's names and shapes come from the model's class, built without memory (PyTorch's meta device); so an
architecture of transformers needs no table of its own here. Whatever is left over on either side is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.conversion.source_tensors import SourceTensor
from storage.errors import ConfigError
from student_train.models.checkpoint import to_legacy_name
from student_train.models.huggingface import find_auto_class, is_empty_expert
from student_train.models.sparse_upcycling import split_experts

Transform = Callable[[Tensor], Tensor]
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Piece:
    """A tensor of the target, made of one of the source: the same one, or what `transform` returns."""

    name: str
    transform: Transform | None = None


MapName = Callable[[str], Sequence[Piece] | None]  # () drops a tensor on purpose; None: the name is unknown


@dataclass(frozen=True)
class PlannedTensor:
    """A source tensor and what becomes of it."""

    source: SourceTensor
    pieces: tuple[Piece, ...]
    duplicates: str | None = None  # the target tensor that it must equal, because the model ties them


@dataclass(frozen=True)
class Expected:
    """Names and shapes of a model's tensors as they are written, and of those that it ties to others."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]  # name -> the one that is written


def list_expected(config: Any) -> Expected:
    """List the tensors that a checkpoint of this configuration holds, under the names that are written."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = find_auto_class(config).from_config(config)
    tied = {to_legacy_name(one): to_legacy_name(other) for one, other in model.all_tied_weights_keys.items()}
    shapes = {
        to_legacy_name(name): tuple(tensor.shape)
        for name, tensor in split_experts(model.state_dict()).items()
        if not is_empty_expert(name, config)
    }
    return Expected({name: shape for name, shape in shapes.items() if name not in tied}, tied)


def plan_tensors(
    tensors: Sequence[SourceTensor],
    map_name: MapName,
    expected: Expected,
    *,
    grown: Mapping[str, int],
    place: str,
) -> list[PlannedTensor]:
    """Plan a conversion. `grown`: rows that a target tensor gets, if it has more than the source.

    ConfigError naming tensors that are unknown, missing, mapped twice or of another shape.
    """
    planned: list[PlannedTensor] = []
    unknown: list[str] = []
    wrong: list[str] = []
    made: dict[str, str] = {}
    for tensor in tensors:
        pieces = map_name(tensor.name)
        if pieces is None:
            unknown.append(f"{tensor.name} {tensor.shape}")
            continue
        if len(pieces) == 1 and pieces[0].name in expected.tied:
            planned.append(PlannedTensor(tensor, (), duplicates=expected.tied[pieces[0].name]))
            continue
        pieces = tuple(_grow(piece, grown.get(piece.name)) for piece in pieces)
        for piece in pieces:
            if piece.name not in expected.shapes:
                unknown.append(f"{tensor.name} {tensor.shape} (would be {piece.name})")
                continue
            if piece.name in made:
                raise ConfigError(f"{place}: {tensor.name} and {made[piece.name]} would both be {piece.name}")
            made[piece.name] = tensor.name
            wanted, got = expected.shapes[piece.name], _measure(tensor, piece)
            if got != wanted:
                wrong.append(f"{tensor.name} has {tensor.shape}, {piece.name} would be {got}, expected {wanted}")
        planned.append(PlannedTensor(tensor, pieces))
    missing = [f"{name} {shape}" for name, shape in expected.shapes.items() if name not in made]
    _raise_if_any(place, "unknown tensors", unknown, "it has parts that this format's mapping does not know")
    _raise_if_any(place, "missing tensors (named as in the target)", missing, "give a complete checkpoint")
    _raise_if_any(place, "shapes that do not fit config.json", wrong, "give the config.json of the weights")
    return planned


def _raise_if_any(place: str, what: str, items: Collection[str], advice: str) -> None:
    if items:
        more = f"\n  and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        shown = "".join(f"\n  {item}" for item in list(items)[:_SHOWN])
        raise ConfigError(f"{place}: {len(items)} {what}; {advice}:{shown}{more}")


def _measure(tensor: SourceTensor, piece: Piece) -> tuple[int, ...]:
    if piece.transform is None:
        return tensor.shape
    try:
        return tuple(piece.transform(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")).shape)
    except (RuntimeError, IndexError) as error:
        raise ConfigError(
            f"{tensor.file.path}: tensor {tensor.name} of the shape {tensor.shape} cannot become {piece.name}: {error}"
        ) from error


def _grow(piece: Piece, num_rows: int | None) -> Piece:
    if num_rows is None:
        return piece

    def grow(tensor: Tensor) -> Tensor:
        rows = tensor if piece.transform is None else piece.transform(tensor)
        if len(rows) >= num_rows:
            return rows
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        return torch.cat([rows, mean.expand(num_rows - len(rows), *rows.shape[1:])])

    return Piece(piece.name, grow)
