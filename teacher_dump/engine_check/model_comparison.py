"""Scores the slice with the model itself, in transformers, and measures how far the engine's states are from it.

Runs in the second process of the engine check, when the engine's has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.records.records import SampleError
from teacher_dump.data.partition import Part
from teacher_dump.engine_check.distances import compute_relation_error, compute_row_distances, find_other_widths
from teacher_dump.engine_check.engine_states import (
    CheckedStates,
    EngineStates,
    describe_device,
    extract_checked_states,
)
from teacher_dump.engine_check.slice_choice import (
    MAX_VISUAL_ROWS,
    CheckTask,
    Kind,
    classify_sample,
    select_checked_rows,
)
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.signals.scoring import PartScorer


@dataclass(frozen=True, eq=False)
class Distances:
    """The distances of one sample by one measure of one family."""

    sample_id: str
    kind: Kind
    family: str
    measure: str
    values: NDArray[np.float64]  # one for each row or image


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """All distances, and the samples that could not be compared."""

    distances: tuple[Distances, ...]
    errors: tuple[SampleError, ...]  # of the model
    device: str  # of the model
    problem: str = ""  # why the two cannot be compared at all


class _IncomparableError(Exception):
    """The engine's states are not those of the same samples, or of the same model."""


def compare_with_model(scorer: PartScorer, argument: tuple[CheckTask, EngineStates]) -> ModelComparison:
    """Scores the slice with the model and compares it with the engine's states.

    A `problem` instead of distances if a sample has changed since the engine scored it, or if the widths of the states
    differ.
    """
    task, engine = argument
    theirs = {states.sample_id: states for states in engine.samples}
    kinds: dict[str, Kind] = {sample.id: classify_sample(sample) for sample in task.samples}
    distances: list[Distances] = []
    errors: list[SampleError] = []
    for chunk in scorer.prepare_chunks(Part(0, task.samples)):
        ready = [sample for sample in chunk.ready if sample.record.sample_id in theirs]
        scored = scorer.hidden_states(ready)
        errors += scored.errors
        for sample, states in scored.accepted:
            ours = extract_checked_states(sample, states, task)
            if not all(bool(torch.isfinite(own).all()) for own in (ours.response, *ours.visual)):
                errors.append(SampleError(ours.sample_id, "its hidden states are not finite"))
                continue
            kind = kinds[ours.sample_id]
            try:
                distances += _compare_sample(scorer, sample, kind, ours, theirs[ours.sample_id], task)
            except _IncomparableError as error:
                return ModelComparison((), (), describe_device(), f"sample {ours.sample_id}: {error}")
    return ModelComparison(tuple(distances), tuple(errors), describe_device())


def _compare_sample(
    scorer: PartScorer,
    sample: PreparedSample,
    kind: Kind,
    model: CheckedStates,
    engine: CheckedStates,
    task: CheckTask,
) -> Iterator[Distances]:
    """Yields the distances of a sample, family by family."""
    if model.fingerprint != engine.fingerprint:
        raise _IncomparableError("its text or an image has changed since the engine scored it; run the check again")
    difference = find_other_widths((model.response, *model.visual), (engine.response, *engine.visual))
    if difference:
        raise _IncomparableError(difference)
    assert scorer.teacher is not None
    head = scorer.teacher.head

    def make(family: str, measure: str, values: NDArray[np.float64]) -> Distances:
        return Distances(model.sample_id, kind, family, measure, values)

    labels = torch.from_numpy(select_checked_rows(sample, whole_images=False).labels)
    response = compute_row_distances(head, model.response, engine.response, labels)
    assert response.label_logprob is not None
    yield make("response", "kl", response.kl)
    yield make("response", "total_variation", response.total_variation)
    yield make("response", "label_logprob", response.label_logprob)
    if model.visual:
        ours, theirs = (torch.cat([_spread_rows(own) for own in of.visual]) for of in (model, engine))
        visual = compute_row_distances(head, ours, theirs, None)
        yield make("visual", "kl", visual.kl)
        yield make("visual", "total_variation", visual.total_variation)
    if model.visual and task.relation_centered is not None:
        centered = task.relation_centered
        pairs = zip(model.visual, engine.visual, strict=True)
        errors = [compute_relation_error(head, own, other, centered=centered) for own, other in pairs]
        yield make("relation", "cosine_error", np.array(errors))


def _spread_rows(states: Tensor) -> Tensor:
    """Returns at most MAX_VISUAL_ROWS rows, evenly spread."""
    count = min(len(states), MAX_VISUAL_ROWS)
    return states[torch.arange(count) * len(states) // max(count, 1)]
