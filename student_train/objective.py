"""A student with its losses: a batch goes in, the loss and its parts come out. No logits of all tokens.

Legend: r rows, i images, n visual tokens of an image, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from student_train.batch import Batch
from student_train.config import BalanceLossSection, DistributionLossSection, LossesSection
from student_train.loader import RowCounts
from student_train.losses import (
    TeacherRows,
    bucketed_forward_kl,
    cross_entropy,
    relation_loss,
    unbiased_forward_kl,
)
from student_train.preference_losses import Rewards, preference
from student_train.router_loss import router_losses
from student_train.student import Student


class Objective(nn.Module):
    """The loss of a micro-batch as its share of the global batch's: sums divided by global row counts."""

    def __init__(
        self,
        student: Student,
        losses: LossesSection,
        *,
        centered: bool,
        chunk_logits: int,
        relation_pool: int | None = None,
    ) -> None:
        """`centered`, `relation_pool`: as the cache's relation matrices are. `chunk_logits`: in memory at once."""
        super().__init__()
        self.student = student
        self._losses = losses
        self._centered = centered
        self._relation_pool = relation_pool
        self._rows_per_chunk = max(1, chunk_logits // student.vocab_size)

    def forward(self, batch: Batch, totals: RowCounts, largest: RowCounts) -> dict[str, Tensor]:
        """Each part as this micro-batch's sum over `totals`, detached, and their weighted sum `loss`.

        Parts of all micro-batches of all ranks add up to the global batch's means. `largest` fixes the number
        of head calls, so that ranks that share parameters move together. A loss whose total is 0 is 0.
        """
        hidden, routers = self._hidden(batch)
        parts = {
            **self._response_parts(hidden, batch, totals.response, largest.response),
            **self._visual_part(hidden, batch, totals.visual, largest.visual),
            **self._relation_part(hidden, batch, totals.relation),
            **self._preference_part(hidden, batch, totals.samples, largest.response),
            **self._router_parts(routers, batch, totals.samples),
        }
        loss = 0 * hidden.float().sum()
        for name, part in parts.items():
            loss = loss + _weight(self._losses, name) * part
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _hidden(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = batch.input_ids, batch.visual_positions, batch.vision
        if self._losses.balance is None:
            return self.student.hidden(*inputs), ()
        return self.student.hidden_and_routers(*inputs)

    def _router_parts(self, logits: Sequence[Tensor], batch: Batch, total: int) -> dict[str, Tensor]:
        """Of a micro-batch by its share of the samples, so that all micro-batches add up to the mean over them."""
        if self._losses.balance is None:
            return {}
        is_token = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device) < batch.lengths[:, None]
        losses = router_losses(logits, (is_token & batch.counted).flatten(), top_k=self.student.top_k)
        share = len(batch.sample_ids) / (2 if self._losses.preference else 1) / max(1, total) * batch.counted
        return {
            "balance": losses.balance * share,
            "router_z": losses.z * share,
            "router_entropy": losses.entropy * share,
            "expert_load_max": losses.load.amax(1).mean() * share,
            "expert_load_min": losses.load.amin(1).mean() * share,
        }

    def _preference_part(self, hidden: Tensor, batch: Batch, total: int, largest: int) -> dict[str, Tensor]:
        section = self._losses.preference
        if section is None:
            return {}
        rows = hidden.index_select(0, batch.response_positions)
        logprobs = self._label_logprobs(rows, batch.labels, largest)
        sequence = torch.arange(len(batch.response_counts), device=rows.device).repeat_interleave(batch.response_counts)
        ratios = logprobs.new_zeros(len(batch.response_counts)).index_add(0, sequence, logprobs)
        if batch.counted:
            assert batch.sequence is not None
            ratios = ratios - batch.sequence.to(ratios)
        pairs = (ratios if batch.counted else ratios[:0]).view(-1, 2)  # chosen, rejected
        rewards = Rewards(pairs[:, 0], pairs[:, 1])
        value = preference(rewards, section) + 0 * logprobs.sum()
        shares = {"preference": value, "preference_won": rewards.num_won.float(), "preference_margin": rewards.margin}
        return {name: share / max(1, total) for name, share in shares.items()}

    def _label_logprobs(self, rows: Tensor, labels: Tensor, largest: int) -> Float[Tensor, " r"]:
        """Log q(label) of each row, chunk by chunk."""

        def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
            return -F.cross_entropy(self.student.logits(hidden).float(), labels, reduction="none")

        chunks = []
        for start, stop in self._chunks(rows.shape[0], largest):
            chunks.append(checkpoint(of_chunk, rows[start:stop], labels[start:stop], use_reentrant=False))
        return torch.cat(chunks)

    def _chunks(self, num_rows: int, largest: int) -> list[tuple[int, int]]:
        """Ranges of rows, as many on every rank; some may be empty."""
        per_chunk = self._rows_per_chunk
        num_chunks = max(1, -(-max(largest, num_rows) // per_chunk))
        return [(min(n * per_chunk, num_rows), min((n + 1) * per_chunk, num_rows)) for n in range(num_chunks)]

    def _response_parts(self, hidden: Tensor, batch: Batch, total: int, largest: int) -> dict[str, Tensor]:
        labels = batch.labels if self._losses.cross_entropy > 0 else None
        section = self._losses.response
        if labels is None and section is None:
            return {}
        rows = hidden.index_select(0, batch.response_positions)
        sums = self._head_sums(rows, labels, batch.response if section else None, section, largest)
        names = ([] if labels is None else ["cross_entropy"]) + ([] if section is None else ["response"])
        return {name: value / max(1, total) for name, value in zip(names, sums, strict=True)}

    def _visual_part(self, hidden: Tensor, batch: Batch, total: int, largest: int) -> dict[str, Tensor]:
        section = self._losses.visual
        if section is None:
            return {}
        rows = hidden.index_select(0, _loss_positions(batch).flatten())
        (value,) = self._head_sums(rows, None, batch.visual, section, largest)
        return {"visual": value / max(1, total)}

    def _relation_part(self, hidden: Tensor, batch: Batch, total: int) -> dict[str, Tensor]:
        if self._losses.relation is None:
            return {}
        positions = _loss_positions(batch)
        rows = hidden.index_select(0, positions.flatten()).view(*positions.shape, hidden.shape[1])
        size = positions.shape[1]
        teacher = rows.new_empty(0, size, size) if batch.relation is None else batch.relation
        value = relation_loss(
            rows, self.student.head_metric(hidden), teacher, centered=self._centered, pool=self._relation_pool
        )
        return {"relation": value / max(1, total)}

    def _head_sums(
        self,
        rows: Float[Tensor, "r d"],
        labels: Int[Tensor, " r"] | None,
        teacher: TeacherRows | None,
        section: DistributionLossSection | None,
        largest: int,
    ) -> list[Tensor]:
        """Sums of cross-entropy (with labels) and of the divergence (with a section), chunk by chunk."""
        chunks = self._chunks(rows.shape[0], largest)
        divergence = {"bucket": bucketed_forward_kl, "unbiased": unbiased_forward_kl}

        def sums(hidden: Tensor, labels: Tensor | None, teacher: TeacherRows | None) -> tuple[Tensor, ...]:
            logits = self.student.logits(hidden).float()
            values = [] if labels is None else [cross_entropy(logits, labels)]
            if section is not None:
                values.append(0 * logits.sum() if teacher is None else divergence[section.treatment](logits, teacher))
            return tuple(values)

        totals: list[Tensor] = []
        for start, stop in chunks:
            inputs = (
                rows[start:stop],
                None if labels is None else labels[start:stop],
                None if teacher is None else teacher.slice(start, stop),
            )
            # One chunk is kept for the backward pass; of more, each is computed again there.
            values = sums(*inputs) if len(chunks) == 1 else checkpoint(sums, *inputs, use_reentrant=False)
            assert values is not None
            totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else list(values)
        return totals


def _loss_positions(batch: Batch) -> Int[Tensor, "i n"]:
    return batch.visual_positions if batch.counted else batch.visual_positions[:0]


def _weight(losses: LossesSection, name: str) -> float:
    """What a part counts in the loss; 0 for one that is only watched."""
    if name in _WATCHED:
        return 0.0
    if name == "router_z":
        return losses.balance.z_weight if losses.balance else 0.0
    section = getattr(losses, name)
    if isinstance(section, BalanceLossSection):
        return section.weight * (2 if section.literal else 1)
    return section if isinstance(section, float | int) else section.weight


def part_names(losses: LossesSection) -> tuple[str, ...]:
    """The parts that these losses compute, in the order of `Objective.forward`."""
    names: list[str] = []
    for name in LossesSection.model_fields:
        if getattr(losses, name):
            names += _PARTS.get(name, (name,))
    return tuple(names)


_PARTS = {  # of the sections that give more than one
    "balance": ("balance", "router_z", "router_entropy", "expert_load_max", "expert_load_min"),
    "preference": ("preference", "preference_won", "preference_margin"),
}
_WATCHED = ("router_entropy", "expert_load_max", "expert_load_min", "preference_won", "preference_margin")
