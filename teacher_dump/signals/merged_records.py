"""Merges the records of several chunks of samples into those of one part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from storage.records.records import PartRecords, TailTotal


def merge_records(chunks: Sequence[PartRecords]) -> PartRecords:
    """Merges records, in order, whose families are the same; an image that several chunks show counts once."""
    merged: dict[str, Any] = {}
    for field in fields(PartRecords):
        values = [value for chunk in chunks if (value := getattr(chunk, field.name)) is not None]
        if field.name == "tail_totals":
            merged[field.name] = _add_tail_totals(values)
        elif values and isinstance(values[0], Mapping):
            merged[field.name] = {key: value for of_chunk in values for key, value in of_chunk.items()}
        elif values:
            merged[field.name] = [value for of_chunk in values for value in of_chunk]
    return PartRecords(**merged)


def _add_tail_totals(chunks: Sequence[Mapping[str, TailTotal]]) -> dict[str, TailTotal]:
    sums: dict[str, TailTotal] = {}
    for totals in chunks:
        for family, tail in totals.items():
            before = sums.get(family)
            sums[family] = (
                tail if before is None else TailTotal(before.total + tail.total, before.num_rows + tail.num_rows)
            )
    return sums
