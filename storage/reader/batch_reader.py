"""Puts samples together from the row groups of their part's files: tokens and the families asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encoding.arrow_rows import hidden_states, relation_matrix, sequence_logprob
from storage.encoding.distributions import RowFormat
from storage.encoding.relation_matrix import check_encoding
from storage.encoding.token_rows import TokenRows
from storage.errors import CorruptPartError
from storage.identity import Identity, stored_hidden, stored_relation
from storage.layout.documents import FileEntry
from storage.layout.part_index import Part
from storage.reader.row_group_cache import DistributionRows, PartFiles
from storage.records.preference_pairs import check_sequence
from storage.records.records import ImageRef, Relation, SequenceLogprob
from storage.records.sample_batch import SampleBatch
from storage.records.sparse_rows import SparseRows

_Piece = tuple[SparseRows, int, int]  # rows start : stop of a row group


class BatchReader:
    """Reads the families that it was made for. Any number of threads may use one."""

    def __init__(self, files: PartFiles, identity: Identity, families: Sequence[str]) -> None:
        self._files = files
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
        """Samples with these positions and ids in the cache, in these rows of their parts, and with these draws.

        Errors: CorruptPartError naming part and sample.
        """
        batch = _Pieces(draw_set)
        for sample_id, part, row in zip(sample_ids, parts, rows, strict=True):
            try:
                self._add(batch, sample_id, part, row)
            except (CorruptPartError, ValueError) as error:
                raise CorruptPartError(f"part {part.number}, sample {sample_id!r}: {error}") from error
        return batch.joined(indices, self._families)

    def _add(self, batch: _Pieces, sample_id: str, part: Part, row: int) -> None:
        tokens, at = self._files.token_rows(part.families["tokens"], row, self._identity)
        if tokens.sample_ids[at] != sample_id:
            raise CorruptPartError("its tokens row belongs to another sample")
        batch.tokens.append((tokens, at))
        num_rows = tokens.num_response_tokens[at]
        if "response" in self._families:
            batch.response.append(self._response(part, row, sample_id, num_rows, batch.draw_set))
        if "hidden" in self._families:
            batch.hidden.append(self._hidden(part, row, sample_id, num_rows))
        if "sequence" in self._families:
            sequence = sequence_logprob(*self._sample_row("sequence", part, row, sample_id))
            check_sequence(sequence, tokens.record(at))
            batch.sequence.append(sequence)
        for image in tokens.images[at]:
            if "visual" in self._families and image.key not in batch.visual:
                batch.visual[image.key] = self._visual(part, image, batch.draw_set)
            if "relation" in self._families and image.key not in batch.relation:
                batch.relation[image.key] = self._relation(part, image)

    def _response(self, part: Part, row: int, sample_id: str, num_rows: int, draw_set: int) -> _Piece:
        kept = self._row_formats["response"]
        group, at = self._files.distribution_rows("response", part.families["response"], row, kept, draw_set)
        if group.keys[at] != sample_id:
            raise CorruptPartError("its response row belongs to another sample")
        return _piece(group, at, num_rows, "response tokens")

    def _visual(self, part: Part, image: ImageRef, draw_set: int) -> SparseRows:
        entry, row = self._image_place(part, "visual", image.key)
        group, at = self._files.distribution_rows("visual", entry, row, self._row_formats["visual"], draw_set)
        rows, start, stop = _piece(group, at, image.num_visual_tokens, f"visual tokens of image {image.path}")
        return rows.slice(start, stop).copy()

    def _relation(self, part: Part, image: ImageRef) -> Relation:
        table, at = self._files.row("relation", *self._image_place(part, "relation", image.key))
        relation = relation_matrix(table, at, image.num_visual_tokens)
        check_encoding(relation, self._relation_section)
        return relation

    def _hidden(self, part: Part, row: int, sample_id: str, num_rows: int) -> NDArray[np.float32]:
        states = hidden_states(*self._sample_row("hidden", part, row, sample_id), self._hidden_section)
        if len(states) != num_rows:
            raise CorruptPartError(f"{len(states)} hidden states for {num_rows} response tokens")
        return states

    def _sample_row(self, family: str, part: Part, row: int, sample_id: str) -> tuple[Any, int]:
        table, at = self._files.row(family, part.families[family], row)
        if table["sample_id"][at].as_py() != sample_id:
            raise CorruptPartError(f"its {family} row belongs to another sample")
        return table, at

    def _image_place(self, part: Part, family: str, key: str) -> tuple[FileEntry, int]:
        entry = part.families[family]
        row = self._files.rows_of(family, entry, "image_key").get(key)
        if row is None:
            raise CorruptPartError(f"image {key} has no {family} rows in its part")
        return entry, row


class _Pieces:
    """What was found of a batch so far, sample by sample, in row groups that others share."""

    def __init__(self, draw_set: int) -> None:
        self.draw_set = draw_set
        self.tokens: list[tuple[TokenRows, int]] = []
        self.response: list[_Piece] = []
        self.hidden: list[NDArray[np.float32]] = []
        self.sequence: list[SequenceLogprob] = []
        self.visual: dict[str, SparseRows] = {}
        self.relation: dict[str, Relation] = {}

    def joined(self, indices: NDArray[np.int64], families: frozenset[str]) -> SampleBatch:
        """The batch, in arrays of its own."""
        spans = [(rows, rows.starts[at], rows.starts[at + 1]) for rows, at in self.tokens]
        return SampleBatch(
            indices=indices,
            sample_ids=[rows.sample_ids[at] for rows, at in self.tokens],
            splits=[rows.splits[at] for rows, at in self.tokens],
            categories=[rows.categories[at] for rows, at in self.tokens],
            token_offsets=_offsets([stop - start for _, start, stop in spans]),
            token_ids=np.concatenate([rows.token_ids[start:stop] for rows, start, stop in spans]),
            response_mask=np.concatenate([rows.response_mask[start:stop] for rows, start, stop in spans]),
            row_offsets=_offsets([rows.num_response_tokens[at] for rows, at in self.tokens]),
            images=[rows.images[at] for rows, at in self.tokens],
            response=SparseRows.gather(self.response) if "response" in families else None,
            visual=self.visual,
            relation=self.relation,
            hidden=self.hidden if "hidden" in families else None,
            sequence=self.sequence if "sequence" in families else None,
        )


def _piece(group: DistributionRows, at: int, num_rows: int, what: str) -> _Piece:
    start, stop = group.starts[at], group.starts[at + 1]
    if stop - start != num_rows:
        raise CorruptPartError(f"{stop - start} rows for {num_rows} {what}")
    return group.rows, start, stop


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
