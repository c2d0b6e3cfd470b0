"""What lossy encodings cost, family by family: measured at encoding, summed up in commits and the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from storage.documents import Commit, ErrorSummary

MEASURES: Mapping[str, str] = {
    "response": "rounding_kl",  # of a row: KL(exact entries || decoded ones) in nats
    "visual": "rounding_kl",
    "relation": "cosine_error",  # of a matrix: 1 - cosine to the matrix that was encoded
    "hidden": "relative_error",  # of a row: ||decoded - encoded|| / ||encoded||
}


def summary(family: str, errors: Sequence[float]) -> ErrorSummary:
    """One or more errors of a family: the same errors in any order give the same summary."""
    return ErrorSummary(
        measure=MEASURES[family],
        count=len(errors),
        mean=math.fsum(errors) / len(errors),
        p99=float(np.quantile(errors, 0.99, method="higher")),
        max=float(max(errors)),
    )


def total(commits: Sequence[Commit]) -> dict[str, ErrorSummary] | None:
    """The summaries of all parts together; None if a part (of an older writer) states no errors.

    The exact p99 is not known: the largest p99 of a part is not below it.
    """
    stated = [commit.errors_by_family for commit in commits if commit.errors_by_family is not None]
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
