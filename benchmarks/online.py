"""The peer of a cache: online distillation, the teacher in memory and asked at every step.

As good as we can make it: no gradient, the student's dtype, one forward pass a batch, the tower's features shared where
teacher and student have the same frozen tower (as both papers have), logits of the wanted rows only, chunk by chunk,
in the same fused head as everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from student_train.data.collate import Batch, ImageRun
from student_train.losses.config import LossesSection, Treatment
from student_train.losses.head_products import TeacherHead
from student_train.losses.row_counts import RowCounts
from student_train.models.student import Student
from student_train.training.objective import CachedTeacher, Objective

States = Callable[[Batch], dict[str, Tensor]]  # response (r, d), visual (i * n, d)


class OnlineObjective(Objective):
    """The objective of the same losses against every token of a teacher that is asked now."""

    def __init__(
        self, student: Student, losses: LossesSection, states: States, head: TeacherHead, *, chunk_logits: int = 1 << 27
    ) -> None:
        """`states`: what a frozen teacher with as many visual tokens as the student says of a batch; `head`: its own.

        Of the losses it has those of rows; they are exact.
        """
        if losses.relation or losses.preference:
            raise ValueError("the live teacher has response and visual losses alone")
        if losses.averaging == "samples":
            raise ValueError("the live teacher does not know which visual rows are a sample's; take another mean")
        exact: dict[str, Treatment] = {"response": "exact", "visual": "exact"}
        known = CachedTeacher(treatments=exact, head=head)
        super().__init__(student, losses, known, chunk_logits=chunk_logits)
        self._states = states
        self._said: dict[str, Tensor] = {}

    def forward(self, batch: Batch, totals: RowCounts, largest: RowCounts) -> dict[str, Tensor]:
        """See Objective; the teacher is asked first."""
        self._said = self._states(batch)
        return super().forward(batch, totals, largest)

    def _get_teacher(self, batch: Batch, name: str) -> Tensor | None:
        return None if getattr(self._losses, name) is None else self._said[name]

    def _split_visual_rows(self, hidden: Tensor, batch: Batch) -> list[tuple[ImageRun, Tensor]]:
        """All of them as one image's, which needs no resampling."""
        rows = hidden.index_select(0, batch.visual_positions if batch.counted else batch.visual_positions[:0])
        return [(ImageRun(1, len(rows), len(rows)), rows[None])] if len(rows) else []


@torch.no_grad()
def teacher_states(teacher: Student, batch: Batch) -> dict[str, Tensor]:
    """The final-norm states of a batch's response rows (r, d) and visual rows (i * n, d)."""
    hidden = teacher.compute_hidden(batch.input_ids, batch.visual_positions, batch.vision)
    places = {"response": batch.response_positions, "visual": batch.visual_positions}
    return {name: hidden.index_select(0, positions) for name, positions in places.items()}


def teacher_head(teacher: Student) -> TeacherHead:
    """The head of a teacher of transformers, cut to the real vocabulary."""
    head, size = teacher.model.lm_head, teacher.vocab_size
    return TeacherHead(head.weight.detach()[:size], None if head.bias is None else head.bias.detach()[:size])
