"""Scores the samples of a part: prompts, teacher and output head make its records.

A sample that cannot be scored becomes a SampleError; anything wrong with the teacher itself is raised.
Legend: r response rows, n visual rows of one image, t unexpanded tokens, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from storage.encoding.relation_matrix import count_grid_blocks
from storage.records.records import PartRecords, SampleError, SequenceLogprob, TokensRecord
from storage.records.sparse_rows import SparseRows
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import Sample, SampleRefusedError
from teacher_dump.prompts.preparation import PreparedSample, Preparer
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.loaded_teacher import LoadedTeacher, ScoredSamples
from teacher_dump.signals.merged_records import merge_records
from teacher_dump.signals.pair_logprobs import drop_lone_halves
from teacher_dump.signals.row_selector import RowSelector, SelectedRows
from teacher_dump.signals.spec import SignalRequest
from teacher_dump.signals.states import SampleStates, get_labels, select_new_images, select_response_states
from teacher_dump.signals.teacher_noise import measure_teacher_noise

_SAMPLES_PER_CALL = 32  # of the engine: their hidden states and pixels are in memory together
T = TypeVar("T")


@dataclass(frozen=True)
class ScoredPart:
    """A part's records, and how many positions the teacher scored."""

    records: PartRecords
    num_tokens: int  # expanded, of the samples that have a record; 0 without a teacher
    num_cut: int  # samples that have a record and were too long to keep whole


@dataclass(frozen=True, eq=False)
class _ScoredChunk:
    records: PartRecords
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples that are ready for the teacher, and errors of those that are not usable."""

    ready: tuple[PreparedSample, ...]
    errors: tuple[SampleError, ...]


class PartScorer:
    """Scores parts with one teacher, or without a teacher if only tokens are requested."""

    def __init__(self, preparer: Preparer, request: SignalRequest, teacher: LoadedTeacher | None) -> None:
        if request.needs_teacher and teacher is None:
            raise ValueError("these signals need a teacher")
        self._preparer = preparer
        self._request = request
        self._teacher = teacher if request.needs_teacher else None
        requests = {"response": request.response, "visual": request.visual}
        self._selectors = {
            family: RowSelector(teacher.head, family, rows)
            for family, rows in requests.items()
            if teacher is not None and rows is not None
        }

    @property
    def teacher(self) -> LoadedTeacher | None:
        return self._teacher

    def prepare_chunks(self, part: Part) -> Iterator[Chunk]:
        """Yields the part's samples in chunks of one engine call, prepared on demand."""
        for start in range(0, len(part.samples), _SAMPLES_PER_CALL):
            yield self.prepare(part.samples[start : start + _SAMPLES_PER_CALL])

    def prepare(self, samples: Sequence[Sample]) -> Chunk:
        """Prepares samples for the teacher."""
        return _prepare_each(((sample.id, sample) for sample in samples), self._prepare)

    def restore(self, records: Sequence[TokensRecord]) -> Chunk:
        """Prepares cached samples for the teacher again. See Preparer.restore."""
        return _prepare_each(((record.sample_id, record) for record in records), self._preparer.restore)

    def hidden_states(self, samples: Sequence[PreparedSample]) -> ScoredSamples:
        """See LoadedTeacher.hidden_states."""
        assert self._teacher is not None
        return self._teacher.hidden_states(samples)

    def score(self, part: Part, chunks: Iterable[Chunk] | None = None) -> ScoredPart:
        """Returns the part's records in the order of its samples. Rows are a function of the part and the seeds.

        `chunks`: those of `prepare_chunks(part)`, if another thread prepares them.
        """
        is_measured = part.number in self._request.measured_parts
        scored: list[_ScoredChunk] = []
        known_images: set[str] = set()  # by key
        cut: set[str] = set()  # ids of samples that are not whole
        for chunk in chain([Chunk((), part.errors)], self.prepare_chunks(part) if chunks is None else chunks):
            measures_noise = is_measured and not any(one.records.teacher_noise for one in scored)
            one = self._score_chunk(chunk, known_images, sums_tails=is_measured, measures_noise=measures_noise)
            scored.append(one)
            known_images |= {image.key for record in one.records.tokens for image in record.images}
            cut |= {prepared.record.sample_id for prepared in chunk.ready if prepared.is_cut}
        records = drop_lone_halves(merge_records([one.records for one in scored]))
        num_cut = sum(record.sample_id in cut for record in records.tokens)
        return ScoredPart(records, sum(one.num_tokens for one in scored), num_cut)

    def _prepare(self, sample: Sample) -> PreparedSample:
        prepared = self._preparer.prepare(sample)
        self._check_grids(prepared)
        return prepared

    def _check_grids(self, prepared: PreparedSample) -> None:
        if self._request.relation_pool is None:
            return
        for image in prepared.record.images:
            try:
                count_grid_blocks(image.num_visual_tokens, self._request.relation_pool)
            except ValueError as error:
                raise SampleRefusedError(f"image {image.path!r}: {error}") from error

    def _score_chunk(
        self, chunk: Chunk, known_images: Container[str], *, sums_tails: bool, measures_noise: bool
    ) -> _ScoredChunk:
        """Returns the records of a chunk; without signals of images whose key is in `known_images`."""
        request, teacher = self._request, self._teacher
        if teacher is None:
            tokens = [sample.record for sample in chunk.ready]
            return _ScoredChunk(PartRecords(tokens, errors=chunk.errors, images=self._collect_images(chunk.ready)), 0)
        answers = teacher.hidden_states(chunk.ready)
        noise: dict[str, list[float]] = {}
        if measures_noise:
            noise = measure_teacher_noise(teacher, answers.accepted, families=self._selectors)
        usable, unusable = _separate(answers.accepted, [self._explain_refusal(*pair) for pair in answers.accepted])
        response = self._select_response_rows(usable, sums_tails=sums_tails)
        logprobs = self._list_label_logprobs(teacher.head, usable, response)
        reasons = [_explain_impossible_token(of_labels) for of_labels in logprobs]
        kept, impossible = _separate(usable, reasons)
        is_kept = [reason is None for reason in reasons]
        new = select_new_images(kept, known_images)
        visual = self._selectors["visual"].select(new, sums_tails=sums_tails) if request.visual else SelectedRows([])
        tails = {"response": response.tail, "visual": visual.tail}
        records = PartRecords(
            tokens=[sample.record for sample, _ in kept],
            response=list(compress(response.rows, is_kept)) if request.response else None,
            visual=dict(zip(new, visual.rows, strict=True)) if request.visual else None,
            relation={key: teacher.head.relation(own, centered=centered) for key, own in new.items()}
            if (centered := request.relation_centered) is not None
            else None,
            errors=(*chunk.errors, *answers.errors, *unusable, *impossible),
            hidden=[select_response_states(*pair).cpu().numpy() for pair in kept]
            if request.hidden_limit is not None
            else None,
            sequence=[_sum_logprobs(one) for one in compress(logprobs, is_kept)] if request.sequence else None,
            images=self._collect_images([sample for sample, _ in kept]),
            tail_totals={family: tail for family, tail in tails.items() if tail is not None},
            teacher_noise=noise,
        )
        return _ScoredChunk(records, sum(len(states) for _, states in kept))

    def _explain_refusal(self, sample: PreparedSample, states: Tensor) -> str | None:
        """Returns why a sample's hidden states cannot be used; None if they can."""
        if not bool(torch.isfinite(states).all()):
            return "the teacher's hidden states are not finite; a wider dtype may help"
        limit = self._request.hidden_limit
        if limit is not None and bool((select_response_states(sample, states).abs() > limit).any()):
            return f"a hidden state is beyond {limit:.6g}; cache.hidden.encoding int8 has no such limit"
        return None

    def _select_response_rows(self, samples: Sequence[SampleStates], *, sums_tails: bool) -> SelectedRows:
        if "response" not in self._selectors:
            return SelectedRows([])
        states = {sample.record.sample_id: select_response_states(sample, own) for sample, own in samples}
        labels = torch.cat([get_labels(sample) for sample, _ in samples]) if samples else None
        return self._selectors["response"].select(states, labels=labels, sums_tails=sums_tails)

    def _list_label_logprobs(
        self, head: OutputHead, samples: Sequence[SampleStates], response: SelectedRows
    ) -> list[np.ndarray]:
        """Returns the logprobs of each sample's response tokens, (r,); empty arrays where no signal needs them."""
        if self._request.response is not None:
            return [_get_label_logprobs(rows) for rows in response.rows]
        if not self._request.sequence:
            return [np.zeros(0, np.float32) for _ in samples]
        return [
            head.compute_label_logprobs(select_response_states(sample, states), get_labels(sample)).cpu().numpy()
            for sample, states in samples
        ]

    def _collect_images(self, samples: Sequence[PreparedSample]) -> dict[str, bytes] | None:
        if not self._request.images:
            return None
        return {image.sha256: image.content for sample in samples for image in sample.images}


def _prepare_each(samples: Iterable[tuple[str, T]], prepare: Callable[[T], PreparedSample]) -> Chunk:
    """Prepares samples, given with their ids; one that is refused becomes an error."""
    ready: list[PreparedSample] = []
    errors: list[SampleError] = []
    for sample_id, sample in samples:
        try:
            ready.append(prepare(sample))
        except SampleRefusedError as refusal:
            errors.append(SampleError(sample_id, str(refusal)))
    return Chunk(tuple(ready), tuple(errors))


def _separate(
    samples: Sequence[SampleStates], reasons: Sequence[str | None]
) -> tuple[list[SampleStates], list[SampleError]]:
    """Returns the samples that there is no reason against, and errors of the others."""
    kept: list[SampleStates] = []
    errors: list[SampleError] = []
    for sample, reason in zip(samples, reasons, strict=True):
        if reason is None:
            kept.append(sample)
        else:
            errors.append(SampleError(sample[0].record.sample_id, reason))
    return kept, errors


def _explain_impossible_token(logprobs: np.ndarray) -> str | None:
    """Returns why a sample with these response logprobs cannot be stored; None if all tokens have p > 0."""
    is_possible = np.isfinite(logprobs)
    if is_possible.all():
        return None
    return f"the teacher gives token {int(np.argmin(is_possible))} of its answer the probability 0"


def _get_label_logprobs(rows: SparseRows) -> np.ndarray:
    assert rows.label_logprob is not None
    return rows.label_logprob


def _sum_logprobs(logprobs: np.ndarray) -> SequenceLogprob:
    """Sums an answer's token logprobs in float64; only the result is float32."""
    return SequenceLogprob(float(np.float32(logprobs.sum(dtype=np.float64))), len(logprobs))
