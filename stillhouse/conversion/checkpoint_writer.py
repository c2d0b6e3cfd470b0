"""Writes tensors to safetensors shards as they come, holding at most one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stillhouse.conversion.source_tensors import open_tensors
from stillhouse.conversion.tensor_plan import PlannedTensor
from storage.errors import ConfigError

_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30


class ShardWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are full; `finish` names the shards."""

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self.num_bytes = 0
        self.peak_bytes = 0  # most that was held at once

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, which the writer copies if it is a view of a larger one."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._shard_bytes:
            self._write_shard()
        is_view = tensor.untyped_storage().nbytes() != size or not tensor.is_contiguous()
        self._held[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor
        self._held_bytes += size
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def finish(self) -> None:
        """Write the last shard, and the index if there are several."""
        if self._held:
            self._write_shard()
        total = len(self._shards)
        if total == 1:
            self._get_path(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file = self._folder / f"model-{number:05d}-of-{total:05d}.safetensors"
            self._get_path(number).rename(file)
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _get_path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _write_shard(self) -> None:
        from safetensors.torch import save_file

        self._shards.append(list(self._held))
        path = self._get_path(len(self._shards))
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod((self._folder / "config.json").stat().st_mode)  # safetensors lets only the owner read
        self._held, self._held_bytes = {}, 0


@torch.no_grad()
def write_tensors(planned: Sequence[PlannedTensor], writer: ShardWriter) -> None:
    """Write planned tensors, file by file. ConfigError for a tied tensor that differs from its twin."""
    _check_duplicates(planned)
    for file in dict.fromkeys(each.source.file for each in planned):
        with open_tensors(file) as tensors:
            for each in planned:
                if each.source.file != file or not each.pieces:
                    continue
                tensor = tensors.load(each.source.stored_name)
                for piece in each.pieces:
                    writer.add(piece.name, tensor if piece.transform is None else piece.transform(tensor))
    writer.finish()


def _check_duplicates(planned: Sequence[PlannedTensor]) -> None:
    """Check that a tensor that the model ties equals the one that is written."""
    written = {piece.name: each.source for each in planned for piece in each.pieces}
    for each in planned:
        if each.duplicates is None:
            continue
        other = written[each.duplicates]
        with open_tensors(each.source.file) as ours, open_tensors(other.file) as theirs:
            one, two = ours.load(each.source.stored_name), theirs.load(other.stored_name)
            same = one.shape == two.shape and bool(torch.equal(one, two))
        if not same:
            raise ConfigError(
                f"{each.source.file.path}: {each.source.name} differs from {other.name}, but config.json ties them "
                "(tie_word_embeddings); correct tie_word_embeddings there"
            )
