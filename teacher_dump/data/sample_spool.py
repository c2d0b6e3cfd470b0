"""Samples on disk: a plan of millions, of which memory holds only where each one begins."""

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


class _Samples(Sequence[Sample], ABC):
    """Samples that are read by their place each time."""

    @abstractmethod
    def _at(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        places = range(len(self))[index]  # IndexError beyond the end, and negative ones from there
        return self._at(places) if isinstance(places, int) else tuple(map(self._at, places))


class SampleFile(_Samples):
    """Samples in the order in which they came, read again whenever one is asked for; 8 bytes of memory each.

    The file has no name, and goes away with the object or its process.
    """

    def __init__(self, samples: Iterable[Sample], *, folder: Path | None = None) -> None:
        """`folder` is where there is room for them, made if need be; None: where temporary files go.

        Errors: those of `samples`; ConfigError, the folder cannot be written to; StillhouseError, its disk is full.
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

    def cut_paths(self, num_characters: int) -> None:
        """Leave out the first characters of every image's path from now on."""
        self._num_cut = num_characters

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _at(self, place: int) -> Sample:
        row = json.loads(self._bytes[self._starts[place] : self._starts[place + 1]])
        row["images"] = [path[self._num_cut :] for path in row["images"]]
        return Sample.from_json(row)


class Replaced(_Samples):
    """A sequence's samples, with others at some places."""

    def __init__(self, samples: Sequence[Sample], others: Mapping[int, Sample]) -> None:
        self._samples = samples
        self._others = others

    def __len__(self) -> int:
        return len(self._samples)

    def _at(self, place: int) -> Sample:
        return self._others[place] if place in self._others else self._samples[place]


class Chosen(_Samples):
    """Some of a sequence's samples, by their places in it. Another process gets the samples themselves."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples = samples
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, place: int) -> Sample:
        return self._samples[self._places[place]]

    def __reduce__(self) -> tuple[type, tuple]:
        return tuple, (tuple(self),)
