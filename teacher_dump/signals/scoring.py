"""Scores the samples of a part: prompts, teacher and output head make its records.

A sample that cannot be scored becomes a SampleError; anything wrong with the teacher itself is raised.
Legend: r response rows, n visual rows of one image, t unexpanded tokens, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.pair_logprobs import drop_lone_halves
from teacher_dump.signals.part_accumulator import PartAccumulator, TailSum
from teacher_dump.signals.sparsify import make_row_uniforms
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.signals.states import get_labels, select_new_images, select_response_states
from teacher_dump.signals.teacher_noise import measure_teacher_noise

_SAMPLES_PER_CALL = 32  # of the engine: their hidden states and pixels are in memory together


@dataclass(frozen=True)
class ScoredPart:
    """A part's records, and how many positions the teacher scored."""

    records: PartRecords
    num_tokens: int  # expanded, of the samples that have a record; 0 without a teacher
    num_cut: int  # samples that have a record and were too long to keep whole


@dataclass(frozen=True, eq=False)
class Chunk:
    """Samples of a part that are ready for the teacher, and errors of those that are not usable."""

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

    @property
    def teacher(self) -> LoadedTeacher | None:
        return self._teacher

    def prepare_chunks(self, part: Part) -> Iterator[Chunk]:
        """Yields the part's samples in chunks of one engine call, prepared on demand."""
        for start in range(0, len(part.samples), _SAMPLES_PER_CALL):
            errors: list[SampleError] = []
            ready = self.prepare(part.samples[start : start + _SAMPLES_PER_CALL], errors)
            yield Chunk(tuple(ready), tuple(errors))

    def score(self, part: Part, chunks: Iterable[Chunk] | None = None) -> ScoredPart:
        """Returns the part's records in the order of its samples. Rows are a function of the part and the seeds.

        `chunks`: those of `prepare_chunks(part)`, if another thread prepares them.
        """
        accumulator = PartAccumulator(errors=list(part.errors))
        is_measured = self._teacher is not None and part.number in self._request.measured_parts
        if self._teacher is not None and is_measured:
            accumulator.tails = {family: TailSum.zeros(self._teacher.head) for family in self._list_row_families()}
        for chunk in self.prepare_chunks(part) if chunks is None else chunks:
            accumulator.errors += chunk.errors
            accumulator.cut |= {prepared.record.sample_id for prepared in chunk.ready if prepared.is_cut}
            if self._teacher is None:
                accumulator.tokens += [prepared.record for prepared in chunk.ready]
                self._add_images(chunk.ready, accumulator)
            elif chunk.ready:
                scored, hidden = self._teacher.hidden_states(chunk.ready, accumulator.errors)
                if is_measured and scored and not accumulator.noise:
                    accumulator.noise = measure_teacher_noise(
                        self._teacher, scored, hidden, families=self._list_row_families()
                    )
                self._add_signals(self._teacher.head, scored, hidden, accumulator)
        records = drop_lone_halves(accumulator.records(self._request))
        num_cut = sum(record.sample_id in accumulator.cut for record in records.tokens)
        return ScoredPart(records, accumulator.num_tokens, num_cut)

    def _list_row_families(self) -> list[str]:
        requests = {"response": self._request.response, "visual": self._request.visual}
        return [family for family, request in requests.items() if request is not None]

    def prepare(self, samples: Sequence[Sample], errors: list[SampleError]) -> list[PreparedSample]:
        """Returns the samples that can be scored; adds the others to `errors`."""
        ready = []
        for sample in samples:
            try:
                prepared = self._preparer.prepare(sample)
                self._check_grids(prepared)
                ready.append(prepared)
            except SampleRefusedError as refusal:
                errors.append(SampleError(sample.id, str(refusal)))
        return ready

    def restore(self, record: TokensRecord) -> PreparedSample:
        """See Preparer.restore."""
        return self._preparer.restore(record)

    def _check_grids(self, prepared: PreparedSample) -> None:
        if self._request.relation_pool is None:
            return
        for image in prepared.record.images:
            try:
                count_grid_blocks(image.num_visual_tokens, self._request.relation_pool)
            except ValueError as error:
                raise SampleRefusedError(f"image {image.path!r}: {error}") from error

    def hidden_states(
        self, samples: Sequence[PreparedSample], errors: list[SampleError]
    ) -> tuple[list[PreparedSample], list[Tensor]]:
        """See LoadedTeacher.hidden_states."""
        assert self._teacher is not None
        return self._teacher.hidden_states(samples, errors)

    def _add_signals(
        self,
        head: OutputHead,
        samples: Sequence[PreparedSample],
        hidden: Sequence[Tensor],
        accumulator: PartAccumulator,
    ) -> None:
        kept: list[tuple[PreparedSample, Tensor]] = []
        for sample, states in zip(samples, hidden, strict=True):
            reason = self._explain_refusal(sample, states)
            if reason is None:
                kept.append((sample, states))
            else:
                accumulator.errors.append(SampleError(sample.record.sample_id, reason))
        if self._request.response is not None:
            rows = self._select_response_rows(head, self._request.response, kept, accumulator.tails.get("response"))
            possible = _find_possible(kept, [_get_label_logprobs(one) for one in rows], accumulator.errors)
            accumulator.response += [rows[at] for at in possible]
            accumulator.sequence += [_sum_logprobs(_get_label_logprobs(rows[at])) for at in possible]
            kept = [kept[at] for at in possible]
        elif self._request.sequence:
            logprobs = [self._compute_logprobs(head, *one) for one in kept]
            possible = _find_possible(kept, logprobs, accumulator.errors)
            accumulator.sequence += [_sum_logprobs(logprobs[at]) for at in possible]
            kept = [kept[at] for at in possible]
        accumulator.tokens += [sample.record for sample, _ in kept]
        self._add_images([sample for sample, _ in kept], accumulator)
        if self._request.hidden_limit is not None:
            accumulator.hidden += [select_response_states(sample, states).cpu().numpy() for sample, states in kept]
        accumulator.num_tokens += sum(len(states) for _, states in kept)
        new = select_new_images(kept, accumulator.image_keys)
        if self._request.visual is not None:
            visual = self._select_sparse_rows(
                head, "visual", self._request.visual, new, accumulator.tails.get("visual")
            )
            accumulator.visual |= dict(zip(new, visual, strict=True))
        if self._request.relation_centered is not None:
            for key, states in new.items():
                accumulator.relation[key] = head.relation(states, centered=self._request.relation_centered)

    def _explain_refusal(self, sample: PreparedSample, states: Tensor) -> str | None:
        """Returns why a sample's hidden states cannot be used; None if they can."""
        if not bool(torch.isfinite(states).all()):
            return "the teacher's hidden states are not finite; a wider dtype may help"
        limit = self._request.hidden_limit
        if limit is not None and bool((select_response_states(sample, states).abs() > limit).any()):
            return f"a hidden state is beyond {limit:.6g}; cache.hidden.encoding int8 has no such limit"
        return None

    def _add_images(self, samples: Sequence[PreparedSample], accumulator: PartAccumulator) -> None:
        if self._request.images:
            accumulator.images |= {image.sha256: image.content for sample in samples for image in sample.images}

    def _select_sparse_rows(
        self,
        head: OutputHead,
        family: str,
        request: RowRequest,
        states: Mapping[str, Tensor],  # (r, d) by sample id, or image key
        tail: TailSum | None,
        *,
        labels: Tensor | None = None,
    ) -> list[SparseRows]:
        if not states:
            return []
        draws = {"seed": request.seed, "family": family, "num_sets": request.draw_sets}
        rows = head.select_sparse_rows(
            torch.cat(list(states.values())),
            labels=labels,
            selection=request.selection,
            uniforms=np.concatenate([make_row_uniforms(len(own), key=key, **draws) for key, own in states.items()]),
            rows_per_chunk=self._request.rows_per_chunk,
            temperatures=request.temperatures,
            tail_total=None if tail is None else tail.total,
        )
        if tail is not None:
            tail.num_rows += rows.num_rows
        return _split_rows(rows, [len(own) for own in states.values()])

    def _select_response_rows(
        self, head: OutputHead, request: RowRequest, kept: Sequence[tuple[PreparedSample, Tensor]], tail: TailSum | None
    ) -> list[SparseRows]:
        states = {sample.record.sample_id: select_response_states(sample, own) for sample, own in kept}
        labels = torch.cat([get_labels(sample) for sample, _ in kept]) if kept else None
        return self._select_sparse_rows(head, "response", request, states, tail, labels=labels)

    def _compute_logprobs(self, head: OutputHead, sample: PreparedSample, states: Tensor) -> np.ndarray:
        """Returns each response token's logprob, (r,)."""
        labels = get_labels(sample)
        rows = select_response_states(sample, states)
        return head.compute_label_logprobs(rows, labels, rows_per_chunk=self._request.rows_per_chunk).cpu().numpy()


def _find_possible(
    kept: Sequence[tuple[PreparedSample, Tensor]], logprobs: Sequence[np.ndarray], errors: list[SampleError]
) -> list[int]:
    """Returns positions of samples whose answer tokens all have p > 0; adds the others to `errors`."""
    possible = []
    for at, ((sample, _), of_labels) in enumerate(zip(kept, logprobs, strict=True)):
        is_possible = np.isfinite(of_labels)
        if is_possible.all():
            possible.append(at)
        else:
            reason = f"the teacher gives token {int(np.argmin(is_possible))} of its answer the probability 0"
            errors.append(SampleError(sample.record.sample_id, reason))
    return possible


def _get_label_logprobs(rows: SparseRows) -> np.ndarray:
    assert rows.label_logprob is not None
    return rows.label_logprob


def _sum_logprobs(logprobs: np.ndarray) -> SequenceLogprob:
    """Sums an answer's token logprobs in float64; only the result is float32."""
    return SequenceLogprob(float(np.float32(logprobs.sum(dtype=np.float64))), len(logprobs))


def _split_rows(rows: SparseRows, counts: Sequence[int]) -> list[SparseRows]:
    stops = np.cumsum(counts)
    return [rows.slice(int(stop) - count, int(stop)) for stop, count in zip(stops, counts, strict=True)]
