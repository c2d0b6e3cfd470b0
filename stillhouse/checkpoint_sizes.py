"""Numbers of weights of checkpoints, from the headers of their files: existing ones, and pruned ones to come."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.errors import StillhouseError
from student_train.config import PruneSection
from teacher_dump.teachers.hf_checkpoint import list_weight_files, read_header

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_VISION = re.compile(r"(?:^|\.)(?:vision|visual)")


def count_weights(folder: Path) -> int:
    """The number of weights of a checkpoint; 0 where there is none yet or none that can be read."""
    return sum(math.prod(shape) for _, shape in _read_shapes(folder))


def count_pruned_weights(section: PruneSection) -> int:
    """At least so many weights will a pruned checkpoint have; 0 where its model cannot be read yet."""
    folder = Path(section.model)
    shapes = _read_shapes(folder)
    widths = {} if section.width is None else _map_widths(section, folder)
    if widths is None:
        return 0
    others, by_layer = 0, defaultdict(int)
    for name, shape in shapes:
        if _VISION.search(name):
            others += math.prod(shape)
            continue
        size = math.prod(widths.get(side, side) for side in shape)
        if (found := _LAYER.search(name)) is None:
            others += size
        else:
            by_layer[int(found[1])] += size
    if section.layers is None:
        return others + sum(by_layer.values())
    if isinstance(section.layers, tuple):
        return others + sum(by_layer[layer] for layer in section.layers)
    return others + sum(sorted(by_layer.values())[: section.layers])


def _read_shapes(folder: Path) -> list[tuple[str, Sequence[int]]]:
    try:
        headers = [read_header(path) for path in list_weight_files(folder)]
    except (StillhouseError, OSError):
        return []
    return [(name, entry["shape"]) for header in headers for name, entry in header.items()]


def _map_widths(section: PruneSection, folder: Path) -> dict[int, int] | None:
    """The new length of each side of a decoder's tensor that narrows; None if the config does not tell."""
    assert section.width is not None
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        text = config.get("text_config", config)
        wanted = {text[name]: size for name, size in section.width.model_dump(exclude_none=True).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return {old: min(old, new) for old, new in wanted.items()}
