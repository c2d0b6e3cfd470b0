"""A batch of samples: tokens and rows of all samples as flat arrays that the batch owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from storage.records.records import ImageRef, Relation, SampleRecord, SequenceLogprob, TokensRecord
from storage.records.sample_key import SampleKey
from storage.records.sparse_rows import SparseRows


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """b samples in the order of `indices`; what a reader returns, and what a training batch is made of as it is.

    A family that was not requested is None. Legend: t tokens, r response rows, i images, n visual rows of all
    images, each over all samples; d hidden size. An image that two samples show counts twice.
    """

    indices: NDArray[np.int64]  # (b,) positions in the cache, or in several caches one after another
    keys: Sequence[SampleKey]
    splits: Sequence[str]
    categories: Sequence[str]
    token_offsets: NDArray[np.int64]  # (b + 1,) sample s has the tokens token_offsets[s] : token_offsets[s + 1]
    token_ids: NDArray[np.int32]  # (t,)
    response_mask: NDArray[np.bool_]  # (t,) True where a loss counts
    row_offsets: NDArray[np.int64]  # (b + 1,) sample s has the response rows row_offsets[s] : row_offsets[s + 1]
    images: Sequence[tuple[ImageRef, ...]]  # i in b tuples
    response: SparseRows | None = None  # (r)
    visual: SparseRows | None = None  # (n) image by image
    relation: Sequence[Relation] | None = None  # i
    hidden: NDArray[np.float32] | None = None  # (r, d) final-norm states
    sequence: NDArray[np.float32] | None = None  # (b,) logprob of each whole response

    @staticmethod
    def of_tokens(records: Sequence[TokensRecord], indices: Sequence[int] | None = None) -> SampleBatch:
        """Joins conversations, such as prompts, that have no signals of a teacher. `indices`: as the field."""
        return SampleBatch(
            indices=np.asarray(range(len(records)) if indices is None else indices, np.int64),
            keys=[record.key for record in records],
            splits=[record.split for record in records],
            categories=[record.category for record in records],
            token_offsets=make_offsets([len(record.token_ids) for record in records]),
            token_ids=np.concatenate([record.token_ids for record in records]),
            response_mask=np.concatenate([record.response_mask for record in records]),
            row_offsets=make_offsets([record.num_response_tokens for record in records]),
            images=[record.images for record in records],
        )

    @property
    def sample_ids(self) -> list[str]:
        """Returns the text of each key."""
        return [key.sample_id for key in self.keys]

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def _image_starts(self) -> list[int]:
        return list(accumulate(map(len, self.images), initial=0))

    @cached_property
    def _visual_starts(self) -> list[int]:
        counts = (image.num_visual_tokens for images in self.images for image in images)
        return list(accumulate(counts, initial=0))

    def record(self, at: int) -> SampleRecord:
        """Returns sample `at` of the batch, 0 <= at < b; its arrays are views of the batch's."""
        tokens = slice(int(self.token_offsets[at]), int(self.token_offsets[at + 1]))
        rows = slice(int(self.row_offsets[at]), int(self.row_offsets[at + 1]))
        images = list(enumerate(self.images[at], start=self._image_starts[at]))
        visual, starts = self.visual, self._visual_starts
        return SampleRecord(
            tokens=TokensRecord(
                key=self.keys[at],
                split=self.splits[at],
                category=self.categories[at],
                token_ids=self.token_ids[tokens],
                response_mask=self.response_mask[tokens],
                images=self.images[at],
            ),
            response=None if self.response is None else self.response.slice(rows.start, rows.stop),
            visual={}
            if visual is None
            else {image.key: visual.slice(starts[place], starts[place + 1]) for place, image in images},
            relation={} if self.relation is None else {image.key: self.relation[place] for place, image in images},
            hidden=None if self.hidden is None else self.hidden[rows],
            sequence=None
            if self.sequence is None
            else SequenceLogprob(float(self.sequence[at]), rows.stop - rows.start),
        )

    def records(self) -> list[SampleRecord]:
        """Returns every sample as a record of its own."""
        return [self.record(at) for at in range(len(self))]


def make_offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    """Returns where each of some ranges starts that lie one after another, and where the last one stops."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
