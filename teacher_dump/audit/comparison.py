"""A sample as a cache has it beside two scorings of it: how far they differ, family by family.

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

from storage.encoding.relation_matrix import compute_stored_norm, decode_relation, encode_relation
from storage.identity import Identity, stored_relation, stored_rounding_kl
from storage.records.records import RelationMatrix, SampleRecord
from storage.records.sparse_rows import LOGPROB_TOLERANCE, SparseRows
from teacher_dump.prompts.preparation import Prepared
from teacher_dump.signals.lm_head import OutputHead

ROWS_AT_ONCE = 256  # of full-vocabulary logprobs
_ROUNDED = 2.0**-11  # relative error of a stored scalar (FORMAT.md)
_ROUNDOFF = 1e-4  # of matrices and states of norm 1 in float32, summed in another order


@dataclass(frozen=True, eq=False)
class Measured:
    """A sample's (or image's) numbers by one measure."""

    sample_id: str
    family: str
    measure: str
    noise: NDArray[np.float64]
    drift: NDArray[np.float64]
    allowed: NDArray[np.float64]  # what encoding may have cost


@dataclass(frozen=True, eq=False)
class Comparison:
    """A sample as the cache has it, beside two scorings of it."""

    identity: Identity
    head: OutputHead
    sample: Prepared
    record: SampleRecord
    bounds: Mapping[str, float]  # the largest error of encoding that the cache states, by family

    def measured(self, first: Tensor, second: Tensor) -> Iterator[Measured]:
        """Every measure of every family that the cache holds of this sample."""
        mask = torch.from_numpy(self.sample.response_positions)
        record = self.record
        if record.response is not None:
            labels = record.tokens.token_ids[record.tokens.response_mask].astype(np.int64)
            yield from self._rows("response", record.response, first[mask], second[mask], torch.from_numpy(labels))
        if record.sequence is not None:
            yield self._sequence(record.sequence.logprob, first[mask], second[mask])
        if record.hidden is not None:
            yield self._hidden(record.hidden, first[mask], second[mask])
        for image, positions in zip(record.tokens.images, self.sample.expansion.visual, strict=True):
            one, other = first[torch.from_numpy(positions)], second[torch.from_numpy(positions)]
            if image.key in record.visual:
                yield from self._rows("visual", record.visual[image.key], one, other, None)
            if image.key in record.relation:
                yield from self._relation(image.key, one, other)

    def _new(self, family: str, name: str, noise: NDArray, drift: NDArray, allowed: NDArray) -> Measured:
        numbers = (np.atleast_1d(np.asarray(each, np.float64)) for each in (noise, drift, allowed))
        return Measured(self.sample.record.sample_id, family, name, *numbers)

    def _rows(
        self, family: str, rows: SparseRows, first: Tensor, second: Tensor, labels: Tensor | None
    ) -> Iterator[Measured]:
        """Scalars in nats or probability, and the total variation of exact entries and tail."""
        once, again = (self._facts(states, rows, labels) for states in (first, second))
        rounded = _ROUNDED if stored_rounding_kl(self.identity, family) > 0 else 0.0
        row = rows.row_of_entry()[rows.is_exact()]
        stored = _Facts(
            rows.label_logprob if labels is not None else None,
            rows.entropy,
            rows.tail_mass,
            np.exp(rows.logprobs[rows.is_exact()].astype(np.float64)),
        )
        for name in ("label_logprob", "entropy", "tail_mass"):
            kept, new, newer = (getattr(facts, name) for facts in (stored, once, again))
            if kept is not None:
                allowed = rounded * np.abs(kept) + LOGPROB_TOLERANCE
                yield self._new(family, name, np.abs(new - newer), np.abs(new - kept), allowed)
        noise = _total_variation(once, again, row, rows.num_rows)
        drift = _total_variation(once, stored, row, rows.num_rows)
        # Pinsker: the rounding of a row moves no more than this of its probability.
        bound = math.sqrt(self.bounds.get(family, 0.0) / 2) + 2 * rounded + LOGPROB_TOLERANCE
        yield self._new(family, "total_variation", noise, drift, np.full(rows.num_rows, bound))

    def _facts(self, states: Tensor, rows: SparseRows, labels: Tensor | None) -> _Facts:
        """What rows would be stored as, unrounded, with the cache's own choice of exact entries."""
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
            parts.append(_Facts(chosen, entropy.cpu().numpy(), tail, probs))
        return _Facts.joined(parts, has_labels=labels is not None)

    def _sequence(self, stored: float, first: Tensor, second: Tensor) -> Measured:
        tokens = self.record.tokens
        labels = torch.from_numpy(tokens.token_ids[tokens.response_mask].astype(np.int64))
        once, again = (
            float(self.head.label_logprobs(states, labels, rows_per_chunk=ROWS_AT_ONCE).double().sum())
            for states in (first, second)
        )
        allowed = LOGPROB_TOLERANCE * max(1, tokens.num_response_tokens)
        return self._new(
            "sequence", "logprob", np.array(abs(once - again)), np.array(abs(once - stored)), np.array(allowed)
        )

    def _hidden(self, stored: NDArray[np.float32], first: Tensor, second: Tensor) -> Measured:
        once, again = first.double().cpu().numpy(), second.double().cpu().numpy()
        size = np.maximum(np.linalg.norm(once, axis=1), np.finfo(np.float64).tiny)
        noise, drift = (np.linalg.norm(once - other, axis=1) / size for other in (again, stored))
        return self._new("hidden", "relative_error", noise, drift, np.full(len(size), self._bound("hidden")))

    def _relation(self, key: str, first: Tensor, second: Tensor) -> Iterator[Measured]:
        """The distance of matrices of norm 1, as the cache encodes them, and how much their norms differ."""
        section, stored = stored_relation(self.identity), self.record.relation[key]
        once, again = (self.head.relation(states, centered=section.centered) for states in (first, second))

        def encoded(matrix: RelationMatrix) -> tuple[NDArray[np.float32], float]:
            norm = compute_stored_norm(matrix, section)
            payload = encode_relation(matrix, section)
            return decode_relation(payload, norm=norm, num_visual_tokens=matrix.num_visual_tokens).values, norm

        (values, norm), (_, other_norm) = encoded(once), encoded(again)
        noise = np.asarray(np.linalg.norm(once.values.astype(np.float64) - again.values))
        drift = np.asarray(np.linalg.norm(values.astype(np.float64) - stored.values))
        # A cosine error is half the squared distance; both matrices went through the encoding.
        allowed = 2 * math.sqrt(2 * self.bounds.get("relation", 0.0)) + _ROUNDOFF
        yield self._new("relation", "distance", noise, drift, np.array(allowed))
        scale = max(norm, float(np.finfo(np.float32).tiny))
        yield self._new(
            "relation",
            "norm",
            np.array(abs(norm - other_norm) / scale),
            np.array(abs(norm - stored.norm) / scale),
            np.array(_ROUNDOFF),
        )

    def _bound(self, family: str) -> float:
        return self.bounds.get(family, 0.0) + _ROUNDOFF


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is compared of some rows, float64."""

    label_logprob: NDArray | None  # (r,)
    entropy: NDArray  # (r,)
    tail_mass: NDArray  # (r,)
    probs: NDArray[np.float64]  # (k,) of the exact entries

    @staticmethod
    def joined(parts: Sequence[_Facts], *, has_labels: bool) -> _Facts:
        """All rows one after another."""

        def join(name: str) -> NDArray[np.float64]:
            return np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])

        labels = join("label_logprob") if has_labels else None
        return _Facts(labels, join("entropy"), join("tail_mass"), join("probs"))


def _total_variation(one: _Facts, other: _Facts, row: NDArray[np.int64], num_rows: int) -> NDArray[np.float64]:
    """(r,) with everything that is not an exact entry merged into one."""
    entries = np.bincount(row, np.abs(one.probs - other.probs), num_rows)
    return (entries + np.abs(one.tail_mass - other.tail_mass.astype(np.float64))) / 2
