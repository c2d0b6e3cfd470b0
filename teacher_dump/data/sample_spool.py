"""Samples on disk: memory holds only the offset of each, so a plan may have millions."""

from __future__ import annotations

import json
import mmap
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import overload

from storage.backends.disk import FULL
from storage.errors import ConfigError, StillhouseError
from teacher_dump.data.sample import Sample


class _LazySamples(Sequence[Sample], ABC):
    """A sequence that reads a sample on each access."""

    @abstractmethod
    def _read_at(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        places = range(len(self))[index]  # IndexError beyond the end, and negative ones from there
        return self._read_at(places) if isinstance(places, int) else tuple(map(self._read_at, places))


class SampleFile(_LazySamples):
    """Samples in their order of arrival, read from a file on each access; 8 bytes of memory each.

    The file has no name and disappears with the object or its process.
    """

    def __init__(self, samples: Iterable[Sample], *, folder: Path | None = None) -> None:
        """Writes the samples below `folder`, which is created if missing; None: the folder of temporary files.

        Raises the errors of `samples`; ConfigError if the folder cannot be written; StillhouseError if its
        disk is full.
        """
        self._starts = array("Q", [0])
        self._bytes: mmap.mmap | bytes = b""
        self._num_cut = 0  # characters of each image's path
        place = folder or gettempdir()
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            opened = TemporaryFile(dir=folder)  # noqa: SIM115  # entered below, where errors mean something else
        except OSError as error:
            raise ConfigError(f"{place}: cannot be written to: {error.strerror}; give another runs_dir") from error
        try:
            with opened as file:
                for sample in samples:
                    self._starts.append(self._starts[-1] + file.write(json.dumps(sample.as_json()).encode()))
                file.flush()
                if self._starts[-1]:
                    self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StillhouseError(f"{place}: has no room for the plan's samples; give another runs_dir") from error

    def strip_path_prefix(self, num_characters: int) -> None:
        """Cuts the first characters off every image's path from now on; a later call replaces this."""
        self._num_cut = num_characters

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _read_at(self, place: int) -> Sample:
        row = json.loads(self._bytes[self._starts[place] : self._starts[place + 1]])
        row["images"] = [path[self._num_cut :] for path in row["images"]]
        return Sample.from_json(row)


class SubstitutedSamples(_LazySamples):
    """A sequence's samples, with others at some positions."""

    def __init__(self, samples: Sequence[Sample], others: Mapping[int, Sample]) -> None:
        self._samples = samples
        self._others = others

    def __len__(self) -> int:
        return len(self._samples)

    def _read_at(self, place: int) -> Sample:
        return self._others[place] if place in self._others else self._samples[place]


class SampleSubset(_LazySamples):
    """Some of a sequence's samples, by their positions. Pickled as the samples themselves."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples = samples
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def _read_at(self, place: int) -> Sample:
        return self._samples[self._places[place]]

    def __reduce__(self) -> tuple[type, tuple]:
        return tuple, (tuple(self),)
