"""Assembles batches of samples from row groups: tokens and the requested families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encoding.arrow_rows import decode_hidden_row, decode_relation_row, decode_sequence_row
from storage.encoding.distributions import RowFormat
from storage.encoding.relation_matrix import check_encoding
from storage.encoding.token_rows import TokenRows
from storage.errors import CorruptPartError
from storage.identity import Identity, stored_hidden, stored_relation
from storage.layout.documents import FileEntry
from storage.layout.part_index import Part
from storage.reader.row_group_cache import DistributionRows, RowGroupCache
from storage.records.preference_pairs import check_sequence
from storage.records.records import ImageRef, Relation, SequenceLogprob
from storage.records.sample_batch import SampleBatch
from storage.records.sparse_rows import SparseRows

_RowSpan = tuple[SparseRows, int, int]  # rows start : stop of a row group


class BatchReader:
    """Reads batches with a fixed set of families. Several threads may share one reader."""

    def __init__(self, files: RowGroupCache, identity: Identity, families: Sequence[str]) -> None:
        self._row_groups = files
        self._identity = identity
        self._families = frozenset(families)
        self._relation_section = stored_relation(identity)
        self._hidden_section = stored_hidden(identity)
        self._row_formats = {family: RowFormat.of(identity, family) for family in ("response", "visual")}

    def read(
        self,
        indices: NDArray[np.int64],
        sample_ids: Sequence[str],
        parts: Sequence[Part],
        rows: Sequence[int],
        *,
        draw_set: int = 0,
    ) -> SampleBatch:
        """Reads samples, given the positions and ids in the cache and the parts and rows where they lie.

        All sequences have one item per sample. `draw_set` as in Cache.read_many. Errors: CorruptPartError
        naming part and sample.
        """
        batch = _BatchParts(draw_set)
        for sample_id, part, row in zip(sample_ids, parts, rows, strict=True):
            try:
                self._add_sample(batch, sample_id, part, row)
            except (CorruptPartError, ValueError) as error:
                raise CorruptPartError(f"part {part.number}, sample {sample_id!r}: {error}") from error
        return batch.to_batch(indices, self._families)

    def _add_sample(self, batch: _BatchParts, sample_id: str, part: Part, row: int) -> None:
        tokens, index = self._row_groups.read_token_rows(part.families["tokens"], row, self._identity)
        if tokens.keys[index].sample_id != sample_id:
            raise CorruptPartError(f"its tokens row is of sample {tokens.keys[index].sample_id!r}")
        batch.tokens.append((tokens, index))
        num_rows = tokens.num_response_tokens[index]
        if "response" in self._families:
            batch.response.append(self._read_response(part, row, sample_id, num_rows, batch.draw_set))
        if "hidden" in self._families:
            batch.hidden.append(self._read_hidden(part, row, sample_id, num_rows))
        if "sequence" in self._families:
            sequence = decode_sequence_row(*self._read_sample_row("sequence", part, row, sample_id))
            check_sequence(sequence, tokens.record(index))
            batch.sequence.append(sequence)
        for image in tokens.images[index]:
            if "visual" in self._families and image.key not in batch.visual:
                batch.visual[image.key] = self._read_visual(part, image, batch.draw_set)
            if "relation" in self._families and image.key not in batch.relation:
                batch.relation[image.key] = self._read_relation(part, image)

    def _read_response(self, part: Part, row: int, sample_id: str, num_rows: int, draw_set: int) -> _RowSpan:
        row_format = self._row_formats["response"]
        group, index = self._row_groups.read_distribution_rows(
            "response", part.families["response"], row, row_format, draw_set
        )
        if group.keys[index] != sample_id:
            raise CorruptPartError(f"its response row is of sample {group.keys[index]!r}")
        return _select_span(group, index, num_rows, "response tokens")

    def _read_visual(self, part: Part, image: ImageRef, draw_set: int) -> SparseRows:
        entry, row = self._find_image_row(part, "visual", image.key)
        group, index = self._row_groups.read_distribution_rows(
            "visual", entry, row, self._row_formats["visual"], draw_set
        )
        rows, start, stop = _select_span(group, index, image.num_visual_tokens, f"visual tokens of image {image.path}")
        return rows.slice(start, stop).copy()

    def _read_relation(self, part: Part, image: ImageRef) -> Relation:
        table, index = self._row_groups.read_row("relation", *self._find_image_row(part, "relation", image.key))
        relation = decode_relation_row(table, index, image.num_visual_tokens)
        check_encoding(relation, self._relation_section)
        return relation

    def _read_hidden(self, part: Part, row: int, sample_id: str, num_rows: int) -> NDArray[np.float32]:
        states = decode_hidden_row(*self._read_sample_row("hidden", part, row, sample_id), self._hidden_section)
        if len(states) != num_rows:
            raise CorruptPartError(f"{len(states)} hidden states for {num_rows} response tokens")
        return states

    def _read_sample_row(self, family: str, part: Part, row: int, sample_id: str) -> tuple[Any, int]:
        table, index = self._row_groups.read_row(family, part.families[family], row)
        if table["sample_id"][index].as_py() != sample_id:
            raise CorruptPartError(f"its {family} row belongs to another sample")
        return table, index

    def _find_image_row(self, part: Part, family: str, key: str) -> tuple[FileEntry, int]:
        entry = part.families[family]
        row = self._row_groups.index_rows(family, entry, "image_key").get(key)
        if row is None:
            raise CorruptPartError(f"image {key} has no {family} rows in its part")
        return entry, row


class _BatchParts:
    """The parts of a batch read so far: per sample, references into shared row groups."""

    def __init__(self, draw_set: int) -> None:
        self.draw_set = draw_set
        self.tokens: list[tuple[TokenRows, int]] = []
        self.response: list[_RowSpan] = []
        self.hidden: list[NDArray[np.float32]] = []
        self.sequence: list[SequenceLogprob] = []
        self.visual: dict[str, SparseRows] = {}
        self.relation: dict[str, Relation] = {}

    def to_batch(self, indices: NDArray[np.int64], families: frozenset[str]) -> SampleBatch:
        """Copies the parts into the arrays of one batch."""
        spans = [(rows, rows.starts[index], rows.starts[index + 1]) for rows, index in self.tokens]
        return SampleBatch(
            indices=indices,
            keys=[rows.keys[index] for rows, index in self.tokens],
            splits=[rows.splits[index] for rows, index in self.tokens],
            categories=[rows.categories[index] for rows, index in self.tokens],
            token_offsets=_make_offsets([stop - start for _, start, stop in spans]),
            token_ids=np.concatenate([rows.token_ids[start:stop] for rows, start, stop in spans]),
            response_mask=np.concatenate([rows.response_mask[start:stop] for rows, start, stop in spans]),
            row_offsets=_make_offsets([rows.num_response_tokens[index] for rows, index in self.tokens]),
            images=[rows.images[index] for rows, index in self.tokens],
            response=SparseRows.gather(self.response) if "response" in families else None,
            visual=self.visual,
            relation=self.relation,
            hidden=self.hidden if "hidden" in families else None,
            sequence=self.sequence if "sequence" in families else None,
        )


def _select_span(group: DistributionRows, index: int, num_rows: int, what: str) -> _RowSpan:
    start, stop = group.starts[index], group.starts[index + 1]
    if stop - start != num_rows:
        raise CorruptPartError(f"{stop - start} rows for {num_rows} {what}")
    return group.rows, start, stop


def _make_offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
