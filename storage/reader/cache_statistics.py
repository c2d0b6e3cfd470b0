"""Counts, sizes and error summaries of a cache, from its commits alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storage.encoding.parquet_schema import FAMILIES
from storage.layout import commits as layout
from storage.layout.error_summaries import KINDS
from storage.layout.part_index import Part, merge_stated_summaries
from storage.layout.segments import Segment


def compute_statistics(parts: Sequence[Part], segments: Sequence[Segment]) -> dict[str, Any]:
    """Returns what Cache.statistics says of the parts; sizes are in bytes."""
    commits = [commit for part in parts for commit in part.commits]
    num_rows = {"response": 0, "visual": 0, **layout.count_rows(commits)}
    stored = {"tokens", *(family for segment in segments for family in segment.families)}
    by_family = {
        family: sum(part.families[family].file_bytes for part in parts if family in part.families)
        for family in FAMILIES
        if family in stored
    }
    head = layout.check_one_head(commits)
    if head is not None:
        by_family[layout.HEAD_FOLDER] = head.file_bytes
    row_bytes = {family: by_family.get(family, 0) for family in num_rows}
    summaries = {kind: merge_stated_summaries(commits, kind) for kind in KINDS}
    return {
        "num_images": sum(part.commits[0].num_images for part in parts),
        "num_parts": len(parts),
        "num_rows": num_rows,
        "bytes": sum(by_family.values()),
        "bytes_by_family": by_family,
        "bytes_per_row": sum(row_bytes.values()) / max(1, sum(num_rows.values())),
        "bytes_per_row_by_family": {family: row_bytes[family] / count for family, count in num_rows.items() if count},
        **{kind: {family: each.model_dump() for family, each in found.items()} for kind, found in summaries.items()},
    }
