"""Scoring: the samples of a part to its records, through prompts, teacher and output head.

A sample that cannot be scored becomes a SampleError; anything wrong with the teacher itself is raised.
Legend: r response rows, n visual rows of one image, t unexpanded tokens, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.encoding.relation_matrix import num_blocks
from storage.records.records import PartRecords, SampleError, SequenceLogprob, TokensRecord
from storage.records.sparse_rows import SparseRows
from teacher_dump.data.partition import Part
from teacher_dump.data.sample import Sample, SampleRefusedError
from teacher_dump.prompts.preparation import Prepared, Preparer
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.pair_logprobs import drop_lone_halves
from teacher_dump.signals.part_accumulator import Gathered, Tail
from teacher_dump.signals.sparsify import row_uniforms
from teacher_dump.signals.spec import RowRequest, SignalRequest
from teacher_dump.signals.states import labels_of, new_images, response_states
from teacher_dump.signals.teacher_noise import teacher_noise

_SAMPLES_PER_CALL = 32  # of the engine: their hidden states and pixels are in memory together


@dataclass(frozen=True)
class ScoredPart:
    """A part's records, and how many positions the teacher was asked about."""

    records: PartRecords
    num_tokens: int  # expanded, of the samples that have a record; 0 without a teacher
    num_cut: int  # samples that have a record and were too long to keep whole


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some samples of a part that are ready for the teacher, and those that cannot be."""

    ready: tuple[Prepared, ...]
    errors: tuple[SampleError, ...]


class PartScorer:
    """Scores parts with one teacher, or with none where only tokens are wanted."""

    def __init__(self, preparer: Preparer, request: SignalRequest, teacher: LoadedTeacher | None) -> None:
        if request.needs_teacher and teacher is None:
            raise ValueError("these signals need a teacher")
        self._preparer = preparer
        self._request = request
        self._teacher = teacher if request.needs_teacher else None

    @property
    def teacher(self) -> LoadedTeacher | None:
        return self._teacher

    def chunks(self, part: Part) -> Iterator[Chunk]:
        """The part's samples, made ready as they are asked for, as many at once as the engine takes."""
        for start in range(0, len(part.samples), _SAMPLES_PER_CALL):
            errors: list[SampleError] = []
            ready = self.prepare(part.samples[start : start + _SAMPLES_PER_CALL], errors)
            yield Chunk(tuple(ready), tuple(errors))

    def score(self, part: Part, chunks: Iterable[Chunk] | None = None) -> ScoredPart:
        """The part's records in the order of its samples. Rows are a function of the part and the seeds.

        `chunks` are those of `chunks(part)`, where another thread makes them.
        """
        gathered = Gathered(errors=list(part.errors))
        is_measured = self._teacher is not None and part.number in self._request.measured_parts
        if self._teacher is not None and is_measured:
            gathered.tails = {family: Tail.of(self._teacher.head) for family in self._distributions()}
        for chunk in self.chunks(part) if chunks is None else chunks:
            gathered.errors += chunk.errors
            gathered.cut |= {prepared.record.sample_id for prepared in chunk.ready if prepared.is_cut}
            if self._teacher is None:
                gathered.tokens += [prepared.record for prepared in chunk.ready]
                self._add_images(chunk.ready, gathered)
            elif chunk.ready:
                scored, hidden = self._teacher.hidden_states(chunk.ready, gathered.errors)
                if is_measured and scored and not gathered.noise:
                    gathered.noise = teacher_noise(self._teacher, scored, hidden, families=self._distributions())
                self._add_signals(self._teacher.head, scored, hidden, gathered)
        records = drop_lone_halves(gathered.records(self._request))
        num_cut = sum(record.sample_id in gathered.cut for record in records.tokens)
        return ScoredPart(records, gathered.num_tokens, num_cut)

    def _distributions(self) -> list[str]:
        requests = {"response": self._request.response, "visual": self._request.visual}
        return [family for family, request in requests.items() if request is not None]

    def prepare(self, samples: Sequence[Sample], errors: list[SampleError]) -> list[Prepared]:
        """The samples that can be scored; the others are added to `errors`."""
        ready = []
        for sample in samples:
            try:
                prepared = self._preparer.prepare(sample)
                self._check_grids(prepared)
                ready.append(prepared)
            except SampleRefusedError as refusal:
                errors.append(SampleError(sample.id, str(refusal)))
        return ready

    def restore(self, record: TokensRecord) -> Prepared:
        """See Preparer.restore."""
        return self._preparer.restore(record)

    def _check_grids(self, prepared: Prepared) -> None:
        if self._request.relation_pool is None:
            return
        for image in prepared.record.images:
            try:
                num_blocks(image.num_visual_tokens, self._request.relation_pool)
            except ValueError as error:
                raise SampleRefusedError(f"image {image.path!r}: {error}") from error

    def hidden_states(
        self, samples: Sequence[Prepared], errors: list[SampleError]
    ) -> tuple[list[Prepared], list[Tensor]]:
        """See LoadedTeacher.hidden_states."""
        assert self._teacher is not None
        return self._teacher.hidden_states(samples, errors)

    def _add_signals(
        self, head: OutputHead, samples: Sequence[Prepared], hidden: Sequence[Tensor], gathered: Gathered
    ) -> None:
        kept: list[tuple[Prepared, Tensor]] = []
        for sample, states in zip(samples, hidden, strict=True):
            reason = self._refusal(sample, states)
            if reason is None:
                kept.append((sample, states))
            else:
                gathered.errors.append(SampleError(sample.record.sample_id, reason))
        if self._request.response is not None:
            rows = self._response(head, self._request.response, kept, gathered.tails.get("response"))
            possible = _possible(kept, [_label_logprobs(one) for one in rows], gathered.errors)
            gathered.response += [rows[at] for at in possible]
            gathered.sequence += [_sequence(_label_logprobs(rows[at])) for at in possible]
            kept = [kept[at] for at in possible]
        elif self._request.sequence:
            logprobs = [self._logprobs(head, *one) for one in kept]
            possible = _possible(kept, logprobs, gathered.errors)
            gathered.sequence += [_sequence(logprobs[at]) for at in possible]
            kept = [kept[at] for at in possible]
        gathered.tokens += [sample.record for sample, _ in kept]
        self._add_images([sample for sample, _ in kept], gathered)
        if self._request.hidden_limit is not None:
            gathered.hidden += [response_states(sample, states).cpu().numpy() for sample, states in kept]
        gathered.num_tokens += sum(len(states) for _, states in kept)
        new = new_images(kept, gathered.image_keys)
        if self._request.visual is not None:
            visual = self._sparse_rows(head, "visual", self._request.visual, new, gathered.tails.get("visual"))
            gathered.visual |= dict(zip(new, visual, strict=True))
        if self._request.relation_centered is not None:
            for key, states in new.items():
                gathered.relation[key] = head.relation(states, centered=self._request.relation_centered)

    def _refusal(self, sample: Prepared, states: Tensor) -> str | None:
        """Why a sample's hidden states cannot be used; None if they can."""
        if not bool(torch.isfinite(states).all()):
            return "the teacher's hidden states are not finite; a wider dtype may help"
        limit = self._request.hidden_limit
        if limit is not None and bool((response_states(sample, states).abs() > limit).any()):
            return f"a hidden state is beyond {limit:.6g}; cache.hidden.encoding int8 has no such limit"
        return None

    def _add_images(self, samples: Sequence[Prepared], gathered: Gathered) -> None:
        if self._request.images:
            gathered.images |= {image.sha256: image.content for sample in samples for image in sample.images}

    def _sparse_rows(
        self,
        head: OutputHead,
        family: str,
        request: RowRequest,
        states: Mapping[str, Tensor],  # (r, d) by sample id, or image key
        tail: Tail | None,
        *,
        labels: Tensor | None = None,
    ) -> list[SparseRows]:
        if not states:
            return []
        draws = {"seed": request.seed, "family": family, "num_sets": request.draw_sets}
        rows = head.sparse_rows(
            torch.cat(list(states.values())),
            labels=labels,
            selection=request.selection,
            uniforms=np.concatenate([row_uniforms(len(own), key=key, **draws) for key, own in states.items()]),
            rows_per_chunk=self._request.rows_per_chunk,
            temperatures=request.temperatures,
            tail_total=None if tail is None else tail.total,
        )
        if tail is not None:
            tail.num_rows += rows.num_rows
        return _split(rows, [len(own) for own in states.values()])

    def _response(
        self, head: OutputHead, request: RowRequest, kept: Sequence[tuple[Prepared, Tensor]], tail: Tail | None
    ) -> list[SparseRows]:
        states = {sample.record.sample_id: response_states(sample, own) for sample, own in kept}
        labels = torch.cat([labels_of(sample) for sample, _ in kept]) if kept else None
        return self._sparse_rows(head, "response", request, states, tail, labels=labels)

    def _logprobs(self, head: OutputHead, sample: Prepared, states: Tensor) -> np.ndarray:
        """(r,) each response token's logprob."""
        labels = labels_of(sample)
        rows = response_states(sample, states)
        return head.label_logprobs(rows, labels, rows_per_chunk=self._request.rows_per_chunk).cpu().numpy()


def _possible(
    kept: Sequence[tuple[Prepared, Tensor]], logprobs: Sequence[np.ndarray], errors: list[SampleError]
) -> list[int]:
    """Which samples' answers the teacher holds possible; a token of probability 0 makes one an error."""
    possible = []
    for at, ((sample, _), of_labels) in enumerate(zip(kept, logprobs, strict=True)):
        is_possible = np.isfinite(of_labels)
        if is_possible.all():
            possible.append(at)
        else:
            reason = f"the teacher gives token {int(np.argmin(is_possible))} of its answer the probability 0"
            errors.append(SampleError(sample.record.sample_id, reason))
    return possible


def _label_logprobs(rows: SparseRows) -> np.ndarray:
    assert rows.label_logprob is not None
    return rows.label_logprob


def _sequence(logprobs: np.ndarray) -> SequenceLogprob:
    """The sum over an answer's tokens, in float32 at the end only."""
    return SequenceLogprob(float(np.float32(logprobs.sum(dtype=np.float64))), len(logprobs))


def _split(rows: SparseRows, counts: Sequence[int]) -> list[SparseRows]:
    stops = np.cumsum(counts)
    return [rows.slice(int(stop) - count, int(stop)) for stop, count in zip(stops, counts, strict=True)]
