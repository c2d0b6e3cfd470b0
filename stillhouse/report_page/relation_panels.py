"""Collects relation matrices of teacher and students for one page: a few held-out images, drawn in the same colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from stillhouse.inspection.image_previews import HeatMap, ImagePreview, draw_heat_map, embed_image
from stillhouse.report_page.gallery import MAX_LOSSLESS_SIDE, MAX_SIDE, OpenCaches, locate_sample
from stillhouse.reporting.results import Results
from storage.errors import StillhouseError
from storage.identity import stored_pixels
from student_train.evaluation.relation_matrices import MAX_SIDE as MAX_ROWS
from student_train.evaluation.relation_matrices import average_blocks


@dataclass(frozen=True)
class StudentMatrix:
    """The matrix of a run's first seed; without one, `reason` says why."""

    run: str
    heat_map: HeatMap | None
    cosines: Sequence[float]  # to the teacher's, of each seed
    reason: str = ""

    @property
    def mean_cosine(self) -> float:
        """Over seeds."""
        return fmean(self.cosines)


@dataclass(frozen=True)
class RelationPanel:
    """One image with the matrices of the teacher and of each run."""

    picture: ImagePreview
    teacher: HeatMap
    num_tokens: int
    is_averaged: bool  # to fewer rows
    students: Sequence[StudentMatrix]


@dataclass(frozen=True)
class RelationPanels:
    """What the page shows; without panels, `note` says why."""

    panels: Sequence[RelationPanel] = ()
    note: str = ""


def build_relation_panels(results: Results, run: str | None) -> RelationPanels:
    """The panels of the images that `run` was evaluated on, with the matrices of all runs that have the same ones."""
    entries = results.runs.get(run or "") or next(iter(results.runs.values()), [])
    if not entries or "relations" not in entries[0]:
        return RelationPanels(note="The evaluations are of an earlier version and keep no relation matrices.")
    caches, panels = OpenCaches(), []
    try:
        for each in entries[0]["relations"]:
            panels.append(_build_panel(each["sample_id"], entries[0], results, caches))
    except (StillhouseError, OSError, KeyError, ValueError) as error:
        return RelationPanels(note=f"The teacher's relation matrices cannot be read here: {error}")
    if not panels:
        return RelationPanels(note="The cache holds no relation matrices of held-out images.")
    return RelationPanels(panels)


def _build_panel(sample_id: str, entry: Mapping[str, Any], results: Results, caches: OpenCaches) -> RelationPanel:
    path, bare = locate_sample(sample_id, entry, results.cache_path)
    cache, _ = caches.open(path)
    record = cache.read(cache.index_of(bare))
    (image,) = record.tokens.images
    values = record.relation[image.key].values
    small = average_blocks(values, MAX_ROWS)
    students = []
    for name, seeds in results.runs.items():
        found = [
            relation
            for seed in seeds
            for relation in seed.get("relations", [])
            if locate_sample(relation["sample_id"], seed, results.cache_path) == (path, bare)
        ]
        shown = [relation for relation in found if "matrix" in relation]
        if not found:
            students.append(StudentMatrix(name, None, (), "judged on other images"))
        elif not shown:
            students.append(StudentMatrix(name, None, (), found[0]["reason"]))
        else:
            heat_map = draw_heat_map(np.array(shown[0]["matrix"]), like=small)
            students.append(StudentMatrix(name, heat_map, [relation["cosine"] for relation in shown]))
    picture = embed_image(
        cache.image_root, image, pixels=stored_pixels(cache.identity), max_side=MAX_SIDE,
        max_lossless_side=MAX_LOSSLESS_SIDE, follows_links=cache.follows_image_links,
    )  # fmt: skip
    return RelationPanel(picture, draw_heat_map(small), len(values), len(values) > len(small), students)
