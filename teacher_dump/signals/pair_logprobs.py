"""Preference pairs in a dump: a half without its other half is useless, so both become errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from storage.records.preference_pairs import check_pairs
from storage.records.records import PartRecords, SampleError, TokensRecord
from storage.records.sample_key import SampleKey

_Aligned = TypeVar("_Aligned")


def drop_lone_halves(records: PartRecords) -> PartRecords:
    """Drops each half of a pair whose other half is missing or has another prompt or other images.

    Each dropped half becomes an error, whose reason contains that of the other half.
    """
    halves = {record.key: record for record in records.tokens if record.key.half is not None}
    reasons = {error.sample_id: error.reason for error in records.errors}
    failed = {key: reason for key in halves if (reason := _explain_removal(key, halves, reasons)) is not None}
    if not failed:
        return records
    kept = [place for place, record in enumerate(records.tokens) if record.key not in failed]
    tokens = [records.tokens[place] for place in kept]
    keys = {image.key for record in tokens for image in record.images}
    shas = {image.sha256 for record in tokens for image in record.images}
    return replace(
        records,
        tokens=tokens,
        response=_take_rows(records.response, kept),
        hidden=_take_rows(records.hidden, kept),
        sequence=_take_rows(records.sequence, kept),
        visual=None if records.visual is None else {key: records.visual[key] for key in records.visual if key in keys},
        relation=None
        if records.relation is None
        else {key: records.relation[key] for key in records.relation if key in keys},
        images=None if records.images is None else {sha: records.images[sha] for sha in records.images if sha in shas},
        errors=[*records.errors, *(SampleError(key.sample_id, reason, key) for key, reason in failed.items())],
    )


def _explain_removal(key: SampleKey, halves: dict[SampleKey, TokensRecord], reasons: dict[str, str]) -> str | None:
    """Returns why a half must be dropped; None if it need not be."""
    other = key.other_half
    if other not in halves:
        reason = reasons.get(other.sample_id, "the data has no such sample")
        return f"is half of a preference pair, and {other.sample_id} has no record: {reason}"
    try:
        check_pairs([halves[key], halves[other]])
    except ValueError as error:
        return str(error)
    return None


def _take_rows(rows: Sequence[_Aligned] | None, kept: Sequence[int]) -> list[_Aligned] | None:
    return None if rows is None else [rows[place] for place in kept]
