"""Finds samples in decoded row groups, and joins what was found into one flat batch: each array is copied once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from storage.reader.row_group_cache import RowGroupCache
from storage.records.preference_pairs import check_sequence
from storage.records.records import ImageRef, Relation
from storage.records.sample_batch import SampleBatch, make_offsets
from storage.records.sparse_rows import RowSpan, SparseRows


class FoundSample(NamedTuple):
    """Where a sample lies in decoded row groups, until `join_samples` copies it; None: a family not requested."""

    tokens: TokenRows
    at: int  # in `tokens`
    response: RowSpan | None
    visual: list[RowSpan] | None  # of each image
    relation: list[Relation] | None  # of each image
    hidden: NDArray[np.float32] | None
    sequence: float | None


def join_samples(found: Sequence[FoundSample], indices: NDArray[np.int64]) -> SampleBatch:
    """Copies samples, of one cache or of several, into the arrays of one batch; one or more.

    A family that was not requested of every cache is left out.
    """
    spans = [(each.tokens, each.tokens.starts[each.at], each.tokens.starts[each.at + 1]) for each in found]
    response, visual, relation, hidden, sequence = (
        _get_if_all(found, name) for name in ("response", "visual", "relation", "hidden", "sequence")
    )
    return SampleBatch(
        indices=indices,
        keys=[each.tokens.keys[each.at] for each in found],
        splits=[each.tokens.splits[each.at] for each in found],
        categories=[each.tokens.categories[each.at] for each in found],
        token_offsets=make_offsets([stop - start for _, start, stop in spans]),
        token_ids=np.concatenate([rows.token_ids[start:stop] for rows, start, stop in spans]),
        response_mask=np.concatenate([rows.response_mask[start:stop] for rows, start, stop in spans]),
        row_offsets=make_offsets([each.tokens.num_response_tokens[each.at] for each in found]),
        images=[each.tokens.images[each.at] for each in found],
        response=None if response is None else SparseRows.gather(response),
        visual=None if visual is None else SparseRows.gather([span for of_images in visual for span in of_images]),
        relation=None if relation is None else [each for of_images in relation for each in of_images],
        hidden=None if hidden is None else np.concatenate(hidden),
        sequence=None if sequence is None else np.array(sequence, np.float32),
    )


class BatchReader:
    """Finds samples with a fixed set of families. Several threads may share one reader."""

    def __init__(self, files: RowGroupCache, identity: Identity, families: Sequence[str]) -> None:
        self._row_groups = files
        self._identity = identity
        self._families = frozenset(families)
        self._relation_section = stored_relation(identity)
        self._hidden_section = stored_hidden(identity)
        self._row_formats = {family: RowFormat.of(identity, family) for family in ("response", "visual")}

    def find(
        self, sample_ids: Sequence[str], parts: Sequence[Part], rows: Sequence[int], *, draw_set: int
    ) -> list[FoundSample]:
        """Finds samples, given their ids and the parts and rows where they lie.

        All sequences have one item per sample. `draw_set` as in Cache.read_many. Errors: CorruptPartError
        naming part and sample.
        """
        relations: dict[str, Relation] = {}  # by image key: each is decoded once
        found = []
        for sample_id, part, row in zip(sample_ids, parts, rows, strict=True):
            try:
                found.append(self._find_sample(sample_id, part, row, draw_set, relations))
            except (CorruptPartError, ValueError) as error:
                raise CorruptPartError(f"part {part.number}, sample {sample_id!r}: {error}") from error
        return found

    def _find_sample(
        self, sample_id: str, part: Part, row: int, draw_set: int, relations: dict[str, Relation]
    ) -> FoundSample:
        tokens, at = self._row_groups.read_token_rows(part.families["tokens"], row, self._identity)
        if tokens.keys[at].sample_id != sample_id:
            raise CorruptPartError(f"its tokens row is of sample {tokens.keys[at].sample_id!r}")
        num_rows, images, families = tokens.num_response_tokens[at], tokens.images[at], self._families
        response = visual = relation = hidden = sequence = None
        if "response" in families:
            response = self._find_rows("response", part.families["response"], row, sample_id, draw_set)
            _check_count(response, num_rows, "response tokens")
        if "hidden" in families:
            hidden = self._read_hidden(part, row, sample_id, num_rows)
        if "sequence" in families:
            read = decode_sequence_row(*self._read_sample_row("sequence", part, row, sample_id))
            check_sequence(read, tokens.record(at))
            sequence = read.logprob
        if "visual" in families:
            visual = [self._find_visual(part, image, draw_set) for image in images]
        if "relation" in families:
            for image in images:
                if image.key not in relations:
                    relations[image.key] = self._read_relation(part, image)
            relation = [relations[image.key] for image in images]
        return FoundSample(tokens, at, response, visual, relation, hidden, sequence)

    def _find_rows(self, family: str, entry: FileEntry, row: int, key: str, draw_set: int) -> RowSpan:
        """Finds the distributions of a sample or image, whose id or key the row must have."""
        stored, span = self._row_groups.read_distribution_rows(family, entry, row, self._row_formats[family], draw_set)
        if stored != key:
            raise CorruptPartError(f"its {family} row is of {stored!r}")
        return span

    def _find_visual(self, part: Part, image: ImageRef, draw_set: int) -> RowSpan:
        span = self._find_rows("visual", *self._find_image_row(part, "visual", image.key), image.key, draw_set)
        _check_count(span, image.num_visual_tokens, f"visual tokens of image {image.path}")
        return span

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


def _get_if_all(found: Sequence[FoundSample], name: str) -> list[Any] | None:
    values = [getattr(each, name) for each in found]
    return None if any(value is None for value in values) else values


def _check_count(span: RowSpan, num_rows: int, what: str) -> None:
    _, start, stop = span
    if stop - start != num_rows:
        raise CorruptPartError(f"{stop - start} rows for {num_rows} {what}")
