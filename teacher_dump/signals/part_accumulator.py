"""What a part's scoring has gathered so far, and the records that it becomes.

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
class Tail:
    """The sum of the tails of all rows so far."""

    total: Tensor  # (v,) float64
    num_rows: int = 0

    @staticmethod
    def of(head: OutputHead) -> Tail:
        return Tail(torch.zeros(head.vocab_size, dtype=torch.float64, device=head.weight.device))

    def summed(self) -> TailTotal:
        return TailTotal(self.total.cpu().numpy(), self.num_rows)


@dataclass
class Gathered:
    """What a part has so far; lists but `errors` are in the order of `tokens`."""

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
    tails: dict[str, Tail] = field(default_factory=dict)  # by family; none in a part that keeps no tails
    noise: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0

    def records(self, request: SignalRequest) -> PartRecords:
        """What a cache of the requested families keeps of it."""
        return PartRecords(
            tokens=self.tokens,
            response=None if request.response is None else self.response,
            visual=None if request.visual is None else self.visual,
            relation=None if request.relation_centered is None else self.relation,
            errors=self.errors,
            hidden=None if request.hidden_limit is None else self.hidden,
            sequence=self.sequence if request.sequence else None,
            images=self.images if request.images else None,
            tail_totals={family: tail.summed() for family, tail in self.tails.items()},
            teacher_noise=self.noise,
        )
