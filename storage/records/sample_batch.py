"""A batch of samples: tokens and rows as flat arrays that the batch owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from storage.records.records import ImageRef, Relation, SampleRecord, SequenceLogprob, TokensRecord
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """b samples in the order of `indices`. Legend: t tokens, r response rows, both over all samples."""

    indices: NDArray[np.int64]  # (b,) positions in the cache
    keys: Sequence[SampleKey]
    splits: Sequence[str]
    categories: Sequence[str]
    token_offsets: NDArray[np.int64]  # (b + 1,) sample i has the tokens token_offsets[i] : token_offsets[i + 1]
    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,) True where a loss counts
    row_offsets: NDArray[np.int64]  # (b + 1,) sample i has the response rows row_offsets[i] : row_offsets[i + 1]
    images: Sequence[tuple[ImageRef, ...]]
    response: SparseRows | None = None  # (r) rows of all samples
    visual: Mapping[str, SparseRows] = field(default_factory=dict)  # by image key, shared by samples
    relation: Mapping[str, Relation] = field(default_factory=dict)  # by image key, shared by samples
    hidden: Sequence[NDArray[np.float32]] | None = None  # per sample (its response rows, d)
    sequence: Sequence[SequenceLogprob] | None = None  # per sample

    @property
    def sample_ids(self) -> list[str]:
        """Returns the text of each key."""
        return [key.sample_id for key in self.keys]

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, at: int) -> SampleRecord:
        """Returns sample `at` of the batch, 0 <= at < b; its arrays are views of the batch's."""
        tokens = slice(int(self.token_offsets[at]), int(self.token_offsets[at + 1]))
        images = self.images[at]
        rows = self.response
        if rows is not None and len(self) > 1:
            rows = rows.slice(int(self.row_offsets[at]), int(self.row_offsets[at + 1]))
        return SampleRecord(
            tokens=TokensRecord(
                key=self.keys[at],
                split=self.splits[at],
                category=self.categories[at],
                token_ids=self.token_ids[tokens],
                response_mask=self.response_mask[tokens],
                images=images,
            ),
            response=rows,
            visual={image.key: self.visual[image.key] for image in images if image.key in self.visual},
            relation={image.key: self.relation[image.key] for image in images if image.key in self.relation},
            hidden=None if self.hidden is None else self.hidden[at],
            sequence=None if self.sequence is None else self.sequence[at],
        )

    def records(self) -> list[SampleRecord]:
        """Returns every sample as a record of its own."""
        return [self.record(at) for at in range(len(self))]
