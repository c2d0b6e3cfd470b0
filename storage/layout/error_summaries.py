"""What was lost between teacher and cache: to noise, selection and encoding; summed up in commits and manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from storage.layout.documents import Commit, ErrorSummary, Losses

MEASURES: Mapping[str, str] = {  # of lossy encodings
    "response": "rounding_kl",  # of a row: KL(exact entries || decoded ones) in nats
    "visual": "rounding_kl",
    "relation": "cosine_error",  # of a matrix: 1 - cosine to the matrix that was encoded
    "hidden": "relative_error",  # of a row: ||decoded - encoded|| / ||encoded||
}
NOISE = "kl"  # of a row: KL(scored || scored again in another batch) over the vocabulary, nats
SELECTION = "distance"  # of a row and set of draws: ||selected - p||_2 over the vocabulary
DROPPED = "tail_mass"  # of a row: the probability of what a selection without draws leaves out
KINDS = tuple(Losses.model_fields)


def summary(family: str, errors: Sequence[float]) -> ErrorSummary:
    """One or more errors of a family's encoding: see `summarize`."""
    return summarize(MEASURES[family], errors)


def summarize(measure: str, errors: Sequence[float]) -> ErrorSummary:
    """One or more errors: the same errors in any order give the same summary."""
    return ErrorSummary(
        measure=measure,
        count=len(errors),
        mean=math.fsum(errors) / len(errors),
        p99=float(np.quantile(errors, 0.99, method="higher")),
        max=float(max(errors)),
    )


def totals(commits: Sequence[Commit]) -> dict[str, dict[str, ErrorSummary] | None]:
    """Every kind of loss of all parts together, by the names of `Losses`."""
    return {kind: total(commits, kind) for kind in KINDS}


def total(commits: Sequence[Commit], kind: str = "errors_by_family") -> dict[str, ErrorSummary] | None:
    """The summaries of all parts together; None if a part (of an older writer) states none.

    The exact p99 is not known: the largest p99 of a part is not below it.
    """
    stated = [errors for commit in commits if (errors := getattr(commit, kind)) is not None]
    if len(stated) < len(commits) or not commits:
        return None
    families = {family for errors in stated for family in errors}
    return {family: _merged([errors[family] for errors in stated if family in errors]) for family in sorted(families)}


def _merged(parts: Sequence[ErrorSummary]) -> ErrorSummary:
    count = sum(part.count for part in parts)
    return ErrorSummary(
        measure=parts[0].measure,
        count=count,
        mean=math.fsum(part.mean * part.count for part in parts) / count,
        p99=max(part.p99 for part in parts),
        max=max(part.max for part in parts),
    )
