"""Selects the sparse rows of one family from hidden states of samples or images.

Legend: r rows of one sample or image, d hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.records.records import TailTotal
from storage.records.sparse_rows import SparseRows
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.sparsify import SelectedBlocks, join_blocks, make_row_uniforms, select_blocks
from teacher_dump.signals.spec import RowRequest


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """The selected rows of samples or images, in order, and the sum of their tails."""

    rows: list[SparseRows]  # views of the same arrays
    tail: TailTotal | None = None


@dataclass(frozen=True, eq=False)
class RowSelector:
    """Selects the rows of one family with a teacher's head."""

    head: OutputHead
    family: str
    request: RowRequest

    def select(
        self, states: Mapping[str, Tensor], *, labels: Tensor | None = None, sums_tails: bool = False
    ) -> SelectedRows:
        """Selects the rows of hidden states, (r, d) by sample id or image key; a key's rows get the same draws again.

        `labels`: of all rows. `sums_tails`: whether the result has a tail total.
        Raises ValueError for logits that are not finite; the errors of `OutputHead.map_logits`.
        """
        if not states:
            nothing = TailTotal(np.zeros(self.head.vocab_size), num_rows=0)
            return SelectedRows([], nothing if sums_tails else None)
        request, device = self.request, self.head.weight.device
        draws = {"seed": request.seed, "family": self.family, "num_sets": request.draw_sets}
        uniforms = np.concatenate([make_row_uniforms(len(own), key=key, **draws) for key, own in states.items()])

        def select(logits: Tensor, rows: slice) -> SelectedBlocks:
            return select_blocks(
                logits,
                labels=None if labels is None else labels[rows].to(device),
                selection=request.selection,
                uniforms=uniforms[rows],
                temperatures=request.temperatures,
                sums_tails=sums_tails,
            )

        blocks = []
        total = torch.zeros(self.head.vocab_size, dtype=torch.float64, device=device)
        for chunk in self.head.map_logits(torch.cat(list(states.values())), select):
            blocks += chunk.blocks
            if chunk.tail_sum is not None:
                total += chunk.tail_sum
        joined = join_blocks(blocks)
        stops = np.cumsum([len(own) for own in states.values()]).tolist()
        rows = [joined.slice(stop - len(own), stop) for stop, own in zip(stops, states.values(), strict=True)]
        return SelectedRows(rows, TailTotal(total.cpu().numpy(), joined.num_rows) if sums_tails else None)
