"""A part's records as Parquet rows: every family's, in row groups, with what its encoding lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from storage.encoding.arrow_rows import (
    Columns,
    family_errors,
    hidden_columns,
    image_columns,
    relation_columns,
    sequence_columns,
    tokens_columns,
)
from storage.encoding.distributions import RowFormat, encode_groups
from storage.encoding.parquet_schema import row_groups
from storage.encoding.tail_profile import TAIL_TOTAL_KEY, encode_tail_total
from storage.identity import Identity, stored_hidden, stored_relation
from storage.records.records import PartRecords, TailTotal
from storage.records.sparse_rows import SparseRows


@dataclass(frozen=True)
class FamilyRows:
    """The Parquet rows of one family."""

    groups: Sequence[Sequence[Columns]]
    metadata: Mapping[str, str]  # of the file
    errors: Sequence[float]  # that encoding made, in the family's own measure

    @property
    def num_rows(self) -> int:
        """Parquet rows of all groups."""
        return sum(map(len, self.groups))


def part_rows(records: PartRecords, identity: Identity, families: Collection[str]) -> Mapping[str, FamilyRows]:
    """The rows of some families, each of which the records have. Images are in the order of the samples.

    ValueError for rows, matrices or states that a cache may not hold.
    """
    return {family: make(records, identity) for family, make in _MAKERS.items() if family in families}


def _tokens(records: PartRecords, _: Identity) -> FamilyRows:
    return _plain("tokens", [tokens_columns(record) for record in records.tokens])


def _response(records: PartRecords, identity: Identity) -> FamilyRows:
    assert records.response is not None
    kept, tail = RowFormat.of(identity, "response"), records.tail_totals.get("response")
    return _distributions(_samples(records), records.response, kept, tail)


def _visual(records: PartRecords, identity: Identity) -> FamilyRows:
    assert records.visual is not None
    keys = _image_keys(records)
    rows = [records.visual[key] for key in keys]
    kept, tail = RowFormat.of(identity, "visual"), records.tail_totals.get("visual")
    return _distributions([{"image_key": key} for key in keys], rows, kept, tail)


def _relation(records: PartRecords, identity: Identity) -> FamilyRows:
    assert records.relation is not None
    section = stored_relation(identity)
    rows = [{"image_key": key, **relation_columns(records.relation[key], section)} for key in _image_keys(records)]
    return _plain("relation", rows)


def _sequence(records: PartRecords, _: Identity) -> FamilyRows:
    assert records.sequence is not None
    pairs = zip(_samples(records), records.sequence, strict=True)
    return _plain("sequence", [{**sample, **sequence_columns(sequence)} for sample, sequence in pairs])


def _hidden(records: PartRecords, identity: Identity) -> FamilyRows:
    assert records.hidden is not None
    section = stored_hidden(identity)
    pairs = zip(_samples(records), records.hidden, strict=True)
    return _plain("hidden", [{**sample, **hidden_columns(states, section)} for sample, states in pairs])


def _images(records: PartRecords, _: Identity) -> FamilyRows:
    assert records.images is not None
    contents = records.images
    shas = dict.fromkeys(image.sha256 for record in records.tokens for image in record.images)
    return _plain("images", [image_columns(sha256, contents[sha256]) for sha256 in shas])


_MAKERS: Mapping[str, Callable[[PartRecords, Identity], FamilyRows]] = {
    "tokens": _tokens,
    "response": _response,
    "visual": _visual,
    "relation": _relation,
    "sequence": _sequence,
    "hidden": _hidden,
    "images": _images,
}


def _samples(records: PartRecords) -> list[Columns]:
    return [{"sample_id": record.sample_id} for record in records.tokens]


def _image_keys(records: PartRecords) -> list[str]:
    return list(dict.fromkeys(image.key for record in records.tokens for image in record.images))


def _plain(family: str, rows: Sequence[Columns]) -> FamilyRows:
    return FamilyRows(row_groups(rows), {}, family_errors(family, rows))


def _distributions(
    keys: Sequence[Columns], rows: Sequence[SparseRows], kept: RowFormat, tail: TailTotal | None
) -> FamilyRows:
    encoded = encode_groups(keys, rows, kept)
    metadata = encoded.metadata if tail is None else {**encoded.metadata, TAIL_TOTAL_KEY: encode_tail_total(tail)}
    return FamilyRows(encoded.groups, metadata, encoded.errors)
