"""Compares a cached sample with two new scorings of it, family by family.

Legend: r rows, v vocabulary, k exact entries of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.encoding.hidden_states import MAX_FLOAT16, decode_hidden, encode_hidden
from storage.encoding.relation_matrix import compute_stored_norm, decode_relation, encode_relation
from storage.identity import Identity, stored_hidden, stored_relation, stored_rounding_kl
from storage.records.records import RelationMatrix, SampleRecord
from storage.records.sparse_rows import LOGPROB_TOLERANCE, SparseRows
from teacher_dump.engine_check.distances import compute_row_distances
from teacher_dump.prompts.preparation import PreparedSample
from teacher_dump.signals.lm_head import OutputHead

KL = "kl"  # the measure that has an absolute limit: nats a row
ROWS_AT_ONCE = 256  # of full-vocabulary logprobs
_ROUNDED = 2.0**-11  # relative error of a stored scalar (FORMAT.md)
_ROUNDOFF = 1e-4  # of matrices and states of norm 1 in float32, summed in another order


@dataclass(frozen=True, eq=False)
class Measurement:
    """The differences of one sample (or image) by one measure."""

    sample_id: str
    family: str
    measure: str
    noise: NDArray[np.float64]
    drift: NDArray[np.float64]
    allowed: NDArray[np.float64]  # the possible error of the encoding


@dataclass(frozen=True, eq=False)
class Comparison:
    """Compares a cached sample with two new scorings of it."""

    identity: Identity
    head: OutputHead
    sample: PreparedSample
    record: SampleRecord
    bounds: Mapping[str, float]  # the largest error of encoding that the cache states, by family

    def measure(self, first: Tensor, second: Tensor) -> Iterator[Measurement]:
        """Yields every measure of every family that the cache holds for this sample."""
        mask = torch.from_numpy(self.sample.response_positions)
        record = self.record
        if record.response is not None:
            labels = record.tokens.token_ids[record.tokens.response_mask].astype(np.int64)
            yield from self._compare_rows(
                "response", record.response, first[mask], second[mask], torch.from_numpy(labels)
            )
        if record.sequence is not None:
            yield self._compare_sequence(record.sequence.logprob, first[mask], second[mask])
        if record.hidden is not None:
            yield from self._compare_hidden(record.hidden, first[mask], second[mask])
        for image, positions in zip(record.tokens.images, self.sample.expansion.visual, strict=True):
            one, other = first[torch.from_numpy(positions)], second[torch.from_numpy(positions)]
            if image.key in record.visual:
                yield from self._compare_rows("visual", record.visual[image.key], one, other, None)
            if image.key in record.relation:
                yield from self._compare_relation(image.key, one, other)

    def _make_measurement(
        self, family: str, name: str, noise: NDArray, drift: NDArray, allowed: NDArray
    ) -> Measurement:
        numbers = (np.atleast_1d(np.asarray(each, np.float64)) for each in (noise, drift, allowed))
        return Measurement(self.sample.record.sample_id, family, name, *numbers)

    def _compare_rows(
        self, family: str, rows: SparseRows, first: Tensor, second: Tensor, labels: Tensor | None
    ) -> Iterator[Measurement]:
        """Yields differences of scalars in nats or probability, and the total variation of entries and tail."""
        once, again = (self._compute_facts(states, rows, labels) for states in (first, second))
        rounded = _ROUNDED if stored_rounding_kl(self.identity, family) > 0 else 0.0
        row = rows.row_of_entry()[rows.is_exact()]
        stored = _RowFacts(
            rows.label_logprob if labels is not None else None,
            rows.entropy,
            rows.tail_mass,
            np.exp(rows.logprobs[rows.is_exact()].astype(np.float64)),
        )
        for name in ("label_logprob", "entropy", "tail_mass"):
            kept, new, newer = (getattr(facts, name) for facts in (stored, once, again))
            if kept is not None:
                allowed = rounded * np.abs(kept) + LOGPROB_TOLERANCE
                yield self._make_measurement(family, name, np.abs(new - newer), np.abs(new - kept), allowed)
        noise = _total_variation(once, again, row, rows.num_rows)
        drift = _total_variation(once, stored, row, rows.num_rows)
        # Pinsker: the rounding of a row moves no more than this of its probability.
        bound = math.sqrt(self.bounds.get(family, 0.0) / 2) + 2 * rounded + LOGPROB_TOLERANCE
        yield self._make_measurement(family, "total_variation", noise, drift, np.full(rows.num_rows, bound))
        noise = _compute_merged_kl(once, again, row, rows.num_rows)
        drift = _compute_merged_kl(once, stored, row, rows.num_rows)
        bound = self.bounds.get(family, 0.0) + rounded + LOGPROB_TOLERANCE
        yield self._make_measurement(family, KL, noise, drift, np.full(rows.num_rows, bound))

    def _compute_facts(self, states: Tensor, rows: SparseRows, labels: Tensor | None) -> _RowFacts:
        """Computes the facts of new rows, unrounded, for the cache's own choice of exact entries."""
        parts = []
        for start in range(0, rows.num_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, rows.num_rows)
            logprobs = self.head.logits(states[start:stop]).log_softmax(dim=1)
            some = rows.slice(start, stop)
            exact = some.is_exact()
            at = torch.from_numpy(some.row_of_entry()[exact]), torch.from_numpy(some.ids[exact].astype(np.int64))
            probs = logprobs[at[0].to(logprobs.device), at[1].to(logprobs.device)].double().exp().cpu().numpy()
            entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).double().sum(dim=1)
            tail = np.maximum(0, 1 - np.bincount(at[0].numpy(), probs, stop - start))
            chosen = None
            if labels is not None:
                chosen = logprobs.gather(1, labels[start:stop, None].to(logprobs.device))[:, 0].double().cpu().numpy()
            parts.append(_RowFacts(chosen, entropy.cpu().numpy(), tail, probs))
        return _RowFacts.concatenate(parts, has_labels=labels is not None)

    def _compare_sequence(self, stored: float, first: Tensor, second: Tensor) -> Measurement:
        tokens = self.record.tokens
        labels = torch.from_numpy(tokens.token_ids[tokens.response_mask].astype(np.int64))
        once, again = (
            float(self.head.compute_label_logprobs(states, labels).double().sum()) for states in (first, second)
        )
        allowed = LOGPROB_TOLERANCE * max(1, tokens.num_response_tokens)
        return self._make_measurement(
            "sequence", "logprob", np.array(abs(once - again)), np.array(abs(once - stored)), np.array(allowed)
        )

    def _compare_hidden(self, stored: NDArray[np.float32], first: Tensor, second: Tensor) -> Iterator[Measurement]:
        """Yields relative errors, and the KL divergence that they make through the output head."""
        once, again = first.double().cpu().numpy(), second.double().cpu().numpy()
        size = np.maximum(np.linalg.norm(once, axis=1), np.finfo(np.float64).tiny)
        noise, drift = (np.linalg.norm(once - other, axis=1) / size for other in (again, stored))
        yield self._make_measurement(
            "hidden", "relative_error", noise, drift, np.full(len(size), self._get_bound("hidden"))
        )
        encoding = stored_hidden(self.identity).encoding
        most = MAX_FLOAT16 if encoding == "float16" else np.inf
        rounded = decode_hidden(encode_hidden(once.astype(np.float32).clip(-most, most), encoding))
        noise, drift, own = (
            compute_row_distances(self.head, first, torch.as_tensor(other, dtype=torch.float32), None).kl
            for other in (second, stored, rounded)
        )
        yield self._make_measurement("hidden", KL, noise, drift, own + _ROUNDOFF)

    def _compare_relation(self, key: str, first: Tensor, second: Tensor) -> Iterator[Measurement]:
        """Yields the distance of matrices of norm 1, after the cache's encoding, and of their norms."""
        section, stored = stored_relation(self.identity), self.record.relation[key]
        once, again = (self.head.relation(states, centered=section.centered) for states in (first, second))

        def encode(matrix: RelationMatrix) -> tuple[NDArray[np.float32], float]:
            norm = compute_stored_norm(matrix, section)
            payload = encode_relation(matrix, section)
            return decode_relation(payload, norm=norm, num_visual_tokens=matrix.num_visual_tokens).values, norm

        (values, norm), (_, other_norm) = encode(once), encode(again)
        noise = np.asarray(np.linalg.norm(once.values.astype(np.float64) - again.values))
        drift = np.asarray(np.linalg.norm(values.astype(np.float64) - stored.values))
        # A cosine error is half the squared distance; both matrices went through the encoding.
        allowed = 2 * math.sqrt(2 * self.bounds.get("relation", 0.0)) + _ROUNDOFF
        yield self._make_measurement("relation", "distance", noise, drift, np.array(allowed))
        scale = max(norm, float(np.finfo(np.float32).tiny))
        yield self._make_measurement(
            "relation",
            "norm",
            np.array(abs(norm - other_norm) / scale),
            np.array(abs(norm - stored.norm) / scale),
            np.array(_ROUNDOFF),
        )

    def _get_bound(self, family: str) -> float:
        return self.bounds.get(family, 0.0) + _ROUNDOFF


@dataclass(frozen=True, eq=False)
class _RowFacts:
    """The compared values of rows, float64."""

    label_logprob: NDArray | None  # (r,)
    entropy: NDArray  # (r,)
    tail_mass: NDArray  # (r,)
    probs: NDArray[np.float64]  # (k,) of the exact entries

    @staticmethod
    def concatenate(parts: Sequence[_RowFacts], *, has_labels: bool) -> _RowFacts:
        """Concatenates the facts of several blocks of rows."""

        def join(name: str) -> NDArray[np.float64]:
            return np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])

        labels = join("label_logprob") if has_labels else None
        return _RowFacts(labels, join("entropy"), join("tail_mass"), join("probs"))


def _total_variation(one: _RowFacts, other: _RowFacts, row: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
    """Computes total variation, (r,), with all tokens but the exact entries merged into one."""
    entries = np.bincount(row, np.abs(one.probs - other.probs), num_rows)
    return (entries + np.abs(one.tail_mass - other.tail_mass.astype(np.float64))) / 2


def _compute_merged_kl(one: _RowFacts, other: _RowFacts, row: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
    """Computes lower bounds of KL(one || other) in nats, (r,): with all tokens but the exact entries merged into one.

    Rows with labels: with all tokens but the label merged, if that is more (a sampled row has no exact entries).
    """
    entries = np.bincount(row, _compute_terms(one.probs, other.probs), num_rows)
    kl = entries + _compute_terms(one.tail_mass, other.tail_mass.astype(np.float64))
    if one.label_logprob is not None and other.label_logprob is not None:
        p, q = (np.exp(label.astype(np.float64)) for label in (one.label_logprob, other.label_logprob))
        kl = np.maximum(kl, _compute_terms(p, q) + _compute_terms(1 - p, 1 - q))
    return np.maximum(kl, 0.0)


def _compute_terms(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes p log(p / q), with probabilities below the resolution of float32 raised to it."""
    least = float(np.finfo(np.float32).eps)
    return p * np.log(np.maximum(p, least) / np.maximum(q, least))
