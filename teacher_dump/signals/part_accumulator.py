"""Accumulates the results of a part's scoring, and makes its records.

Legend: v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from storage.records.records import PartRecords, RelationMatrix, SampleError, SequenceLogprob, TailTotal, TokensRecord
from storage.records.sparse_rows import SparseRows
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.spec import SignalRequest


@dataclass
class TailSum:
    """The sum of the tails of all scored rows."""

    total: Tensor  # (v,) float64
    num_rows: int = 0

    @staticmethod
    def zeros(head: OutputHead) -> TailSum:
        return TailSum(torch.zeros(head.vocab_size, dtype=torch.float64, device=head.weight.device))

    def to_record(self) -> TailTotal:
        return TailTotal(self.total.cpu().numpy(), self.num_rows)


@dataclass
class PartAccumulator:
    """The results of a part so far; all lists except `errors` are in the order of `tokens`."""

    tokens: list[TokensRecord] = field(default_factory=list)
    response: list[SparseRows] = field(default_factory=list)
    visual: dict[str, SparseRows] = field(default_factory=dict)
    relation: dict[str, RelationMatrix] = field(default_factory=dict)
    hidden: list[np.ndarray] = field(default_factory=list)
    sequence: list[SequenceLogprob] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    image_keys: set[str] = field(default_factory=set)
    errors: list[SampleError] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)  # ids of samples that are not whole
    tails: dict[str, TailSum] = field(default_factory=dict)  # by family; none in a part that keeps no tails
    noise: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0

    def records(self, request: SignalRequest) -> PartRecords:
        """Returns the records of the requested families."""
        return PartRecords(
            tokens=self.tokens,
            response=None if request.response is None else self.response,
            visual=None if request.visual is None else self.visual,
            relation=None if request.relation_centered is None else self.relation,
            errors=self.errors,
            hidden=None if request.hidden_limit is None else self.hidden,
            sequence=self.sequence if request.sequence else None,
            images=self.images if request.images else None,
            tail_totals={family: tail.to_record() for family, tail in self.tails.items()},
            teacher_noise=self.noise,
        )
