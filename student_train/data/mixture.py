"""The data of a stage: one or several caches, read as one and shuffled into one order.

A weight says how often a cache's samples occur in an epoch: 2 means twice each; 0.5 means half of them, alternately,
so that over the epochs all samples of a cache occur equally often. Order depends only on caches, weights, seed,
epoch and window: an epoch takes the next samples of each cache's own endless shuffled sequence
(storage/reader/shuffle.py), and mixes the caches evenly without changing the order within any. So each cache is read
through a window, at the same cost as a single cache.

Legend: s samples of all caches, one cache after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from storage.identity import Identity
from storage.images.pixels import Picture
from storage.reader.batch_reader import FoundSample, join_samples
from storage.reader.cache import Cache
from storage.reader.shuffle import Shuffle, slice_epochs
from storage.records.records import ImageRef
from storage.records.sample_batch import SampleBatch
from student_train.data.sample_images import ImageSource, open_images

_KEPT_EPOCHS = 2  # a batch may run over the end of one


@dataclass(frozen=True, eq=False)
class CacheSource:
    """One cache of a stage, and the samples of it that are trained on."""

    cache: Cache
    indices: NDArray[np.int64]  # samples (n,) or pairs (n, 2) of the cache
    weight: float = 1.0
    images: str | None = None  # folder; None: the folder that the cache names, or the cache itself


class Mixture:
    """Several caches read as one; a sample's index is its index in its cache plus the sizes of the caches before.

    With several caches, sample ids are shown as NUMBER:ID with the cache's number, since two may hold the same id.
    """

    def __init__(self, sources: Sequence[CacheSource]) -> None:
        self.sources = tuple(sources)
        self._starts = np.cumsum([0, *(source.cache.num_samples for source in sources)])

    @property
    def identity(self) -> Identity:
        """The first cache's identity; caches that one student fits agree in all fields that it uses."""
        return self.sources[0].cache.identity

    @property
    def indices_of_sources(self) -> list[NDArray[np.int64]]:
        """The samples (n,), or pairs (n, 2), of each source."""
        starts = self._starts[:-1].tolist()
        return [source.indices + start for source, start in zip(self.sources, starts, strict=True)]

    @property
    def indices(self) -> NDArray[np.int64]:
        """The samples (s,), or pairs (s, 2), that are trained on."""
        return np.concatenate(self.indices_of_sources)

    def read_many(self, indices: Sequence[int] | NDArray[np.int64], *, draw_set: int = 0) -> SampleBatch:
        """Read one or more samples, in this order. Errors as Cache.read_many."""
        chosen = np.array(indices, np.int64)
        owners = _find_owners(self._starts, chosen)
        found: dict[int, FoundSample] = {}  # by place in the batch
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            own = chosen[places] - self._starts[owner]
            found.update(zip(places.tolist(), self.sources[owner].cache.find_many(own, draw_set=draw_set), strict=True))
        samples = join_samples([found[place] for place in range(len(chosen))], chosen)
        if len(self.sources) == 1:
            return samples
        shown = zip(owners.tolist(), samples.keys, strict=True)
        return replace(samples, keys=[replace(key, row_id=f"{owner}:{key.row_id}") for owner, key in shown])

    def order(self, *, window_rows: int) -> InterleavedOrder:
        """Return the shuffled order of `indices`; each cache gets an equal share of the window."""
        share = max(1, window_rows // len(self.sources))
        return InterleavedOrder(
            [
                source.cache.shuffle(
                    source.indices if source.indices.ndim == 1 else source.indices[:, 0], window_rows=share
                )
                for source in self.sources
            ],
            [source.weight for source in self.sources],
        )

    def images(self, processor: Any) -> ImageSource:
        """Open the samples' images."""
        folders = [open_images(source.cache, source.images, processor) for source in self.sources]
        return folders[0] if len(folders) == 1 else _MixtureImages(folders, self._starts)


class InterleavedOrder:
    """The endless sequence of epochs over several shuffled caches. Positions are those of `Mixture.indices`.

    Invariant: epoch e has the positions e * n to (e + 1) * n of each cache's own endless sequence, in that order, n
    being its weight times its samples, rounded, and at least 1.
    """

    def __init__(self, orders: Sequence[Shuffle], weights: Sequence[float]) -> None:
        self._orders = tuple(orders)
        self._starts = np.cumsum([0, *(len(order) for order in orders)])[:-1].tolist()
        self.counts = [max(1, round(weight * len(each))) for each, weight in zip(orders, weights, strict=True)]
        self._epochs: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Return the number of positions of an epoch."""
        return sum(self.counts)

    def epoch(self, epoch: int, *, seed: int) -> NDArray[np.int64]:
        """Return the positions (len(self),) of one epoch."""
        positions = self._epochs.get((seed, epoch))
        if positions is None:
            positions = self._epochs[seed, epoch] = self._mix(epoch, seed)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
        return positions

    def batch(self, step: int, size: int, *, seed: int) -> NDArray[np.int64]:
        """Return the positions (size,) of the endless sequence from `step * size` on."""
        return slice_epochs(lambda epoch: self.epoch(epoch, seed=seed), len(self), step * size, size)

    def _mix(self, epoch: int, seed: int) -> NDArray[np.int64]:
        owners = np.repeat(np.arange(len(self._orders)), self.counts)
        owners = np.random.Generator(np.random.PCG64([seed, epoch, len(owners)])).permutation(owners)
        positions = np.empty(len(owners), np.int64)
        for number, (order, count, start) in enumerate(zip(self._orders, self.counts, self._starts, strict=True)):
            own_seed = seed + (number << 64)  # else caches of the same size would get the same order
            positions[owners == number] = order.batch(epoch, count, seed=own_seed) + start
        positions.flags.writeable = False  # since it is kept
        return positions


class _MixtureImages:
    """The images of several caches; a sample's index selects the cache."""

    def __init__(self, folders: Sequence[ImageSource], starts: NDArray[np.int64]) -> None:
        self._folders = folders
        self._starts = starts

    @property
    def processor(self) -> Any:
        return self._folders[0].processor

    def load_picture(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Picture:
        folder, own = self._find_folder(index)
        return folder.load_picture(image, sample_id=sample_id, index=own)

    def load_pixels(self, image: ImageRef, *, sample_id: str, index: int | None = None) -> Tensor:
        folder, own = self._find_folder(index)
        return folder.load_pixels(image, sample_id=sample_id, index=own)

    def make_blank(self) -> Tensor:
        return self._folders[0].make_blank()

    def _find_folder(self, index: int | None) -> tuple[ImageSource, int]:
        assert index is not None
        owner = int(_find_owners(self._starts, np.array([index]))[0])
        return self._folders[owner], index - int(self._starts[owner])


def _find_owners(starts: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the cache (len(indices),) that holds each sample. `starts`: the first index of each."""
    return np.searchsorted(starts, indices, side="right") - 1
