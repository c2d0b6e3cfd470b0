"""Encodes a part's records as Parquet rows by family, in row groups, with their encoding errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.encoding.arrow_rows import (
    Columns,
    collect_encoding_errors,
    encode_hidden_row,
    encode_image_row,
    encode_relation_row,
    encode_sequence_row,
    encode_tokens_row,
)
from storage.encoding.distributions import RowFormat, encode_groups
from storage.encoding.parquet_schema import RowGroups, encode_parquet, split_row_groups
from storage.encoding.tail_profile import TAIL_TOTAL_KEY, encode_tail_total
from storage.identity import Identity, stored_hidden, stored_relation
from storage.records.records import PartRecords
from storage.records.sparse_rows import SparseRows


@dataclass(frozen=True)
class PartEncoder:
    """Encodes parts of a segment: the given families of its identity."""

    identity: Identity
    families: tuple[str, ...]
    zstd_level: int = 9

    def encode(self, records: PartRecords) -> Mapping[str, RowGroups]:
        """Encodes each family of a part; images are in the order of the samples.

        Errors: ValueError for rows, matrices or states that a cache may not store.
        """
        return {family: make(records, self.identity) for family, make in _ENCODERS.items() if family in self.families}

    def to_parquet(self, family: str, rows: RowGroups) -> bytes:
        """Returns the bytes of a family's file."""
        return encode_parquet(family, rows.groups, zstd_level=self.zstd_level, metadata=rows.metadata)


def _encode_tokens(records: PartRecords, _: Identity) -> RowGroups:
    return _group_rows("tokens", [encode_tokens_row(record) for record in records.tokens])


def _encode_response(records: PartRecords, identity: Identity) -> RowGroups:
    assert records.response is not None
    return _encode_distributions("response", records, identity, _make_sample_keys(records), records.response)


def _encode_visual(records: PartRecords, identity: Identity) -> RowGroups:
    assert records.visual is not None
    keys = _list_image_keys(records)
    rows = [records.visual[key] for key in keys]
    return _encode_distributions("visual", records, identity, [{"image_key": key} for key in keys], rows)


def _encode_relation(records: PartRecords, identity: Identity) -> RowGroups:
    assert records.relation is not None
    section = stored_relation(identity)
    rows = [
        {"image_key": key, **encode_relation_row(records.relation[key], section)} for key in _list_image_keys(records)
    ]
    return _group_rows("relation", rows)


def _encode_sequence(records: PartRecords, _: Identity) -> RowGroups:
    assert records.sequence is not None
    pairs = zip(_make_sample_keys(records), records.sequence, strict=True)
    return _group_rows("sequence", [{**sample, **encode_sequence_row(sequence)} for sample, sequence in pairs])


def _encode_hidden(records: PartRecords, identity: Identity) -> RowGroups:
    assert records.hidden is not None
    section = stored_hidden(identity)
    pairs = zip(_make_sample_keys(records), records.hidden, strict=True)
    return _group_rows("hidden", [{**sample, **encode_hidden_row(states, section)} for sample, states in pairs])


def _encode_images(records: PartRecords, _: Identity) -> RowGroups:
    assert records.images is not None
    contents = records.images
    shas = dict.fromkeys(image.sha256 for record in records.tokens for image in record.images)
    return _group_rows("images", [encode_image_row(sha256, contents[sha256]) for sha256 in shas])


_ENCODERS: Mapping[str, Callable[[PartRecords, Identity], RowGroups]] = {
    "tokens": _encode_tokens,
    "response": _encode_response,
    "visual": _encode_visual,
    "relation": _encode_relation,
    "sequence": _encode_sequence,
    "hidden": _encode_hidden,
    "images": _encode_images,
}


def _make_sample_keys(records: PartRecords) -> list[Columns]:
    return [{"sample_id": record.sample_id} for record in records.tokens]


def _list_image_keys(records: PartRecords) -> list[str]:
    return list(dict.fromkeys(image.key for record in records.tokens for image in record.images))


def _group_rows(family: str, rows: Sequence[Columns]) -> RowGroups:
    return RowGroups(split_row_groups(rows), {}, collect_encoding_errors(family, rows))


def _encode_distributions(
    family: str, records: PartRecords, identity: Identity, keys: Sequence[Columns], rows: Sequence[SparseRows]
) -> RowGroups:
    encoded, tail = encode_groups(keys, rows, RowFormat.of(identity, family)), records.tail_totals.get(family)
    if tail is None:
        return encoded
    return replace(encoded, metadata={**encoded.metadata, TAIL_TOTAL_KEY: encode_tail_total(tail)})
