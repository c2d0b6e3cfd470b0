"""Summarizes the errors between teacher and cache (noise, selection, encoding) for commits and manifests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from storage.identity import Identity, stored_tau
from storage.layout.documents import Commit, ErrorSummaries, ErrorSummary
from storage.records.records import PartRecords

MEASURES: Mapping[str, str] = {  # of lossy encodings
    "response": "rounding_kl",  # of a row: KL(exact entries || decoded ones) in nats
    "visual": "rounding_kl",
    "relation": "cosine_error",  # of a matrix: 1 - cosine to the matrix that was encoded
    "hidden": "relative_error",  # of a row: ||decoded - encoded|| / ||encoded||
}
NOISE = "kl"  # of a row: KL(scored || scored again in another batch) over the vocabulary, nats
SELECTION = "distance"  # of a row and set of draws: ||selected - p||_2 over the vocabulary
DROPPED = "tail_mass"  # of a row: the probability of what a selection without draws leaves out
KINDS = tuple(ErrorSummaries.model_fields)


def summarize_encoding_errors(family: str, errors: Sequence[float]) -> ErrorSummary:
    """Summarizes one or more errors of a family's encoding; see `summarize_errors`."""
    return summarize_errors(MEASURES[family], errors)


def summarize_errors(measure: str, errors: Sequence[float]) -> ErrorSummary:
    """Summarizes one or more errors; the result does not depend on their order."""
    return ErrorSummary(
        measure=measure,
        count=len(errors),
        mean=math.fsum(errors) / len(errors),
        p99=float(np.quantile(errors, 0.99, method="higher")),
        max=float(max(errors)),
    )


def merge_all_summaries(commits: Sequence[Commit]) -> dict[str, dict[str, ErrorSummary] | None]:
    """Merges the summaries of all parts, for each field of `ErrorSummaries`."""
    return {kind: merge_summaries(commits, kind) for kind in KINDS}


def merge_summaries(commits: Sequence[Commit], kind: str = "errors_by_family") -> dict[str, ErrorSummary] | None:
    """Merges the summaries of all parts, by family; None if any part has none.

    The merged p99 is an upper bound: the largest p99 of a part.
    """
    stated = [errors for commit in commits if (errors := getattr(commit, kind)) is not None]
    if len(stated) < len(commits) or not commits:
        return None
    families = {family for errors in stated for family in errors}
    return {family: _merge([errors[family] for errors in stated if family in errors]) for family in sorted(families)}


def _merge(parts: Sequence[ErrorSummary]) -> ErrorSummary:
    count = sum(part.count for part in parts)
    return ErrorSummary(
        measure=parts[0].measure,
        count=count,
        mean=math.fsum(part.mean * part.count for part in parts) / count,
        p99=max(part.p99 for part in parts),
        max=max(part.max for part in parts),
    )


def summarize_errors_before_encoding(records: PartRecords, identity: Identity) -> dict[str, dict[str, ErrorSummary]]:
    """Summarizes the errors made before encoding, by kind and family; leaves out what was not measured."""
    rows_of = {"response": list(records.response or ()), "visual": list((records.visual or {}).values())}
    noise = {family: summarize_errors(NOISE, values) for family, values in records.teacher_noise.items() if len(values)}
    selection: dict[str, ErrorSummary] = {}
    dropped: dict[str, ErrorSummary] = {}
    for family, rows in rows_of.items():
        sets = [of_set.selection_error for each in rows for of_set in (each, *each.other_sets)]
        errors = [error for of_set in sets if of_set is not None for error in of_set.tolist()]
        if errors:
            selection[family] = summarize_errors(SELECTION, errors)
        tails = [tail for each in rows for tail in each.tail_mass.tolist()]
        if tails and stored_tau(identity, family) == 0:
            dropped[family] = summarize_errors(DROPPED, tails)
    return {"teacher_noise": noise, "selection_errors": selection, "dropped_mass": dropped}
