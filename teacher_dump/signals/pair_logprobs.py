"""Preference pairs in a dump: a half whose other half has no record is no use, so both become errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from storage.records.preference_pairs import CHOSEN, REJECTED, check_pairs, other_half
from storage.records.records import PartRecords, SampleError, TokensRecord

_Aligned = TypeVar("_Aligned")


def drop_lone_halves(records: PartRecords) -> PartRecords:
    """The records without any half of a pair that lacks its other half or has another prompt than it.

    Each half that goes becomes an error of its own: what the other failed of stands in its reason.
    """
    halves = {record.sample_id: record for record in records.tokens if record.sample_id.endswith((CHOSEN, REJECTED))}
    reasons = {error.sample_id: error.reason for error in records.errors}
    failed = {name: reason for name in halves if (reason := _reason(name, halves, reasons)) is not None}
    if not failed:
        return records
    kept = [place for place, record in enumerate(records.tokens) if record.sample_id not in failed]
    tokens = [records.tokens[place] for place in kept]
    keys = {image.key for record in tokens for image in record.images}
    shas = {image.sha256 for record in tokens for image in record.images}
    return replace(
        records,
        tokens=tokens,
        response=_taken(records.response, kept),
        hidden=_taken(records.hidden, kept),
        sequence=_taken(records.sequence, kept),
        visual=None if records.visual is None else {key: records.visual[key] for key in records.visual if key in keys},
        relation=None
        if records.relation is None
        else {key: records.relation[key] for key in records.relation if key in keys},
        images=None if records.images is None else {sha: records.images[sha] for sha in records.images if sha in shas},
        errors=[*records.errors, *(SampleError(name, reason) for name, reason in failed.items())],
    )


def _reason(name: str, halves: dict[str, TokensRecord], reasons: dict[str, str]) -> str | None:
    """Why a half cannot stay; None if it can."""
    other = other_half(name)
    if other not in halves:
        said = reasons.get(other, "the data has no such sample")
        return f"is half of a preference pair, and {other} has no record: {said}"
    try:
        check_pairs([halves[name], halves[other]])
    except ValueError as error:
        return str(error)
    return None


def _taken(rows: Sequence[_Aligned] | None, kept: Sequence[int]) -> list[_Aligned] | None:
    return None if rows is None else [rows[place] for place in kept]
