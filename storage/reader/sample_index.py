"""The index of a cache's samples, as Arrow and NumPy arrays rather than a Python object per sample."""

# pyarrow makes its compute functions when it is imported:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.encoding.parquet_schema import SCHEMAS

INDEX_COLUMNS = (
    "sample_id", "split", "category", "num_tokens", "num_response_tokens", "image_visual_tokens",
)  # fmt: skip
_NO_SAMPLES = pa.schema([SCHEMAS["tokens"].field(name) for name in INDEX_COLUMNS]).empty_table()


class TextColumn(Sequence[str]):
    """An Arrow text column (`arrow`) that behaves as a sequence of str."""

    def __init__(self, arrow: pa.ChunkedArray) -> None:
        self.arrow = arrow

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.arrow.take(pa.array(range(len(self))[index], pa.int64())).to_pylist()
        return self.arrow[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.arrow.chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as lists

    def __repr__(self) -> str:
        return f"TextColumn of {len(self):,}"

    def count(self, value: str) -> int:
        """Returns how many samples have this text."""
        return pc.sum(pc.equal(self.arrow, value)).as_py() or 0

    def unique(self) -> list[str]:
        """Returns the distinct texts, in the order of their first samples."""
        return self.arrow.unique().to_pylist()

    def find_positions(self, values: Sequence[str]) -> NDArray[np.int64]:
        """Returns (n,) the ascending positions of the samples that have one of these texts."""
        mask = pc.is_in(self.arrow, value_set=pa.array(list(values), pa.string()))
        return np.flatnonzero(mask.to_numpy()).astype(np.int64)


class SampleIndex:
    """The index of a cache: samples in the order of its parts and of rows within a part."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        """`tables`: the INDEX_COLUMNS of the tokens of each part, in order."""
        whole = pa.concat_tables(tables) if tables else _NO_SAMPLES
        self.sample_ids = TextColumn(whole["sample_id"])
        self.splits = TextColumn(whole["split"].dictionary_encode())
        self.categories = TextColumn(whole["category"].dictionary_encode())
        self.num_tokens: NDArray[np.int32] = whole["num_tokens"].to_numpy()
        self.num_response_rows: NDArray[np.int32] = whole["num_response_tokens"].to_numpy()
        visual = whole["image_visual_tokens"]
        self.num_images: NDArray[np.int32] = pc.list_value_length(visual).to_numpy().astype(np.int32)
        per_image = pc.list_flatten(visual).to_numpy().astype(np.int64)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_image)])
        stops = np.cumsum(self.num_images, dtype=np.int64)
        self.num_visual_tokens: NDArray[np.int64] = sums[stops] - sums[stops - self.num_images]  # of the teacher
        self._part_stops = np.cumsum([table.num_rows for table in tables], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def has_duplicates(self) -> bool:
        """True if two samples have the same id."""
        return pc.count_distinct(self.sample_ids.arrow).as_py() != len(self)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the positions of the parts that samples lie in, and the samples' rows there; (n,) each."""
        parts = np.searchsorted(self._part_stops, indices, side="right")
        starts = np.concatenate([np.zeros(1, np.int64), self._part_stops])[parts]
        return parts, indices - starts

    def assign_parts(self) -> NDArray[np.int64]:
        """Returns (s,) the position of the part that each sample lies in."""
        return self.locate(np.arange(len(self)))[0]

    def find(self, sample_id: str) -> int:
        """Returns the position of a sample. Errors: KeyError."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.sample_ids[int(self._by_id[middle])] < sample_id:
                low = middle + 1
            else:
                high = middle
        if low < len(self) and self.sample_ids[found := int(self._by_id[low])] == sample_id:
            return found
        raise KeyError(sample_id)

    @cached_property
    def _by_id(self) -> NDArray[np.uint64]:
        """Positions sorted by id. Arrow sorts by UTF-8 bytes, which is the order of code points."""
        return pc.sort_indices(self.sample_ids.arrow).to_numpy()
