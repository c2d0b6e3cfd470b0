"""The same samples in mosaicml-streaming and litdata, set up as their own documentation advises.

Both keep plain arrays. Their batches are what a trainer takes and what our loader gives: every array of the
samples, one after another. Streaming: MDS with a typed column an array, `StreamingDataset(local=…, batch_size=…,
shuffle=True)` in a DataLoader (quick start; the start's zstd is a setting of its own, since a local copy is
unpacked once and kept). litdata: `optimize(…, chunk_bytes="64MB")`, `StreamingDataset(…, shuffle=True)` in a
`StreamingDataLoader`. Workers: as many as cores, which both advise, and none, which ragged samples may prefer.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.reader.cache import Cache

Sample = Mapping[str, np.ndarray]
_TYPES = {
    "token_ids": "int32",
    "response_mask": "uint8",
    "counts": "int32",  # of entries, row by row
    "ids": "int32",
    "logprobs": "float32",
    "num_exact": "int32",
    "tail_mass": "float32",
    "entropy": "float32",
    "label_logprob": "float32",
}


@dataclass(frozen=True)
class Peer:
    """A way to keep and load the samples."""

    library: str  # its package on PyPI
    num_workers: int
    compression: str | None = None

    def __str__(self) -> str:
        packed = f", {self.compression}" if self.compression else ""
        return f"{self.library}{packed}, {self.num_workers} workers"


def peers() -> list[Peer]:
    """The settings that are measured."""
    cores = os.cpu_count() or 1
    return [
        Peer("mosaicml-streaming", cores),
        Peer("mosaicml-streaming", 0),
        Peer("mosaicml-streaming", cores, "zstd"),
        Peer("litdata", cores),
        Peer("litdata", 0),
    ]


def sample_of(cache: Cache, index: int) -> dict[str, np.ndarray]:
    """A sample as the plain arrays that the peers keep."""
    record = cache.read(index)
    rows = record.response
    assert rows is not None
    assert rows.label_logprob is not None
    return {
        "token_ids": record.tokens.token_ids,
        "response_mask": record.tokens.response_mask.astype(np.uint8),
        "counts": np.diff(rows.offsets).astype(np.int32),
        "ids": rows.ids,
        "logprobs": rows.logprobs,
        "num_exact": rows.num_exact,
        "tail_mass": rows.tail_mass,
        "entropy": rows.entropy,
        "label_logprob": rows.label_logprob,
    }


class _Fetch:
    """sample_of an index; the cache is opened in the process that asks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Cache | None = None

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        self._cache = self._cache or Cache.open(self._path)
        return sample_of(self._cache, index)


def joined(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """A batch: each array of the samples, one after another."""
    return {name: np.concatenate([sample[name] for sample in samples]) for name in _TYPES}


def epochs(peer: Peer, cache_path: Path, folder: Path, *, batch_size: int, num_epochs: int) -> list[float]:
    """Samples a second of each epoch, the loader's start included. The samples are written first, if need be."""
    with_peer = {"mosaicml-streaming": _streaming, "litdata": _litdata}[peer.library]
    place = folder / f"{peer.library}-{peer.compression}"
    loader = with_peer(peer, cache_path, place, batch_size)
    rates, expected = [], Cache.open(cache_path, ()).num_samples
    for _ in range(num_epochs):
        start = time.perf_counter()
        num_samples, num_rows = _consume(loader)
        rates.append(num_samples / (time.perf_counter() - start))
        if num_samples != expected or num_rows == 0:
            raise SystemExit(f"{peer}: an epoch had {num_samples} samples and {num_rows} rows, expected {expected}")
    return rates


def _consume(batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[int, int]:
    num_samples, num_rows = 0, 0
    for batch in batches:
        num_samples += int(batch["num_samples"])
        num_rows += len(batch["tail_mass"])
    return num_samples, num_rows


def _collate(samples: Sequence[Sample]) -> dict[str, Any]:
    return {**joined(samples), "num_samples": len(samples)}


def _streaming(peer: Peer, cache_path: Path, place: Path, batch_size: int) -> Iterable:
    from torch.utils.data import DataLoader

    from storage.processes import torchvision_shim

    torchvision_shim.import_torch_companions()  # streaming imports torchvision for data sets that are not used here
    streaming = importlib.import_module("streaming")
    importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    if not place.exists():
        cache = Cache.open(cache_path)
        columns = {name: f"ndarray:{kind}" for name, kind in _TYPES.items()}
        with streaming.MDSWriter(out=str(place), columns=columns, compression=peer.compression) as writer:
            for index in range(cache.num_samples):
                writer.write(sample_of(cache, index))
    dataset = streaming.StreamingDataset(local=str(place), batch_size=batch_size, shuffle=True)
    return DataLoader(dataset, batch_size=batch_size, num_workers=peer.num_workers, collate_fn=_collate)


def _litdata(peer: Peer, cache_path: Path, place: Path, batch_size: int) -> Iterable:
    litdata = importlib.import_module("litdata")
    if not place.exists():
        inputs = list(range(Cache.open(cache_path, ()).num_samples))
        litdata.optimize(
            fn=_Fetch(cache_path), inputs=inputs, output_dir=str(place), num_workers=1, chunk_bytes="64MB",
            compression=peer.compression,
        )  # fmt: skip
    dataset = litdata.StreamingDataset(str(place), shuffle=True, drop_last=False)
    return litdata.StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=peer.num_workers, collate_fn=_collate
    )
