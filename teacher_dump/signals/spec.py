"""The requested signals: the families, and how entries of their rows are selected."""

from __future__ import annotations

from dataclasses import dataclass

from storage.selection import Selection


@dataclass(frozen=True)
class RowRequest:
    """The selection of a family's rows, and the seed of its draws."""

    selection: Selection
    seed: int
    temperatures: tuple[float, ...] = ()  # besides 1
    draw_sets: int = 1  # independent draws a row


@dataclass(frozen=True)
class SignalRequest:
    """The families to compute; None for a family that is not requested."""

    response: RowRequest | None = None
    visual: RowRequest | None = None
    relation_centered: bool | None = None
    relation_pool: int | None = None  # side of the blocks that relation matrices are averaged over
    hidden_limit: float | None = None  # the largest hidden state that the cache's encoding holds
    sequence: bool = False  # logprobs of whole answers
    images: bool = False  # store the images' files
    measured_parts: frozenset[int] = frozenset()  # parts that measure the tail sum and the teacher's noise

    @property
    def needs_teacher(self) -> bool:
        signals = (self.response, self.visual, self.relation_centered, self.hidden_limit)
        return self.sequence or any(signal is not None for signal in signals)
