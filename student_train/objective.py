"""A student with its losses: a batch goes in, the loss and its parts come out. No logits of all tokens.

Legend: r rows, i images, n visual tokens of an image, m those of the teacher, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage.errors import ConfigError
from student_train.batch import Batch, ImageGrids
from student_train.config import BalanceLossSection, DistributionLossSection, LossesSection, Treatment
from student_train.fused_head import HeadTask, HiddenTarget, SparseTarget, TeacherHead, fused_head_loss
from student_train.loader import RowCounts
from student_train.losses import Rule, TailProfile, TeacherRows
from student_train.preference_losses import Rewards, preference
from student_train.relation import head_metric, relation_loss, resampling
from student_train.router_loss import router_losses
from student_train.student import Student


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """What losses need of a cache besides its rows."""

    centered: bool = False  # of relation matrices
    pool: int | None = None  # side of the blocks of the grid that relation matrices are averaged over
    treatments: Mapping[str, Treatment] = field(default_factory=dict)  # of families whose loss says `auto`, at least
    temperatures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of each family's log-sum-exp
    profiles: Mapping[str, Tensor] = field(default_factory=dict)  # (v,) of the families whose loss uses one
    head: TeacherHead | None = None  # where a loss is exact

    def to(self, device: torch.device) -> CachedTeacher:
        """The same on another device."""
        head = self.head
        if head is not None:
            head = replace(
                head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device)
            )
        return replace(self, head=head, profiles={name: each.to(device) for name, each in self.profiles.items()})


class Objective(nn.Module):
    """The loss of a micro-batch as its share of the global batch's: sums divided by global row counts."""

    def __init__(self, student: Student, losses: LossesSection, teacher: CachedTeacher, *, chunk_logits: int) -> None:
        """`teacher`: on the student's device. `chunk_logits`: in memory at once."""
        super().__init__()
        self.student = student
        self._losses = losses
        self._teacher = teacher
        self._chunk_logits = chunk_logits
        self._rows_per_chunk = max(1, chunk_logits // student.vocab_size)  # where the head is called as a module
        self._rules = {name: _rule(losses, teacher, name) for name in ("response", "visual")}
        self._profiles = {
            name: TailProfile.of(profile, temperature=self._rules[name].temperature, dtype=torch.float32)
            for name, profile in teacher.profiles.items()
        }
        self._frozen_metric: Tensor | None = None

    def forward(self, batch: Batch, totals: RowCounts, largest: RowCounts) -> dict[str, Tensor]:
        """Each part as this micro-batch's sum over `totals`, detached, and their weighted sum `loss`.

        Parts of all micro-batches of all ranks add up to the global batch's means. `largest` fixes the number
        of calls of the head as a module, so that ranks that share parameters (ZeRO-3) move together; the fused
        head takes its weight once, however many rows a rank has. A loss whose total is 0 is 0.
        """
        hidden, routers = self._hidden(batch)
        loss, parts = self._row_parts(hidden, batch, totals)
        others = {
            **self._relation_part(hidden, batch, totals.relation),
            **self._preference_part(hidden, batch, totals.samples, largest.response),
            **self._router_parts(routers, batch, totals.samples),
        }
        for name, part in others.items():
            loss = loss + _weight(self._losses, name) * part
            parts[name] = part.detach()
        return {"loss": loss + 0 * hidden.float().sum(), **parts}

    def _hidden(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = batch.input_ids, batch.visual_positions, batch.vision
        if self._losses.balance is None:
            return self.student.hidden(*inputs), ()
        return self.student.hidden_and_routers(*inputs)

    def _router_parts(self, logits: Sequence[Tensor], batch: Batch, total: int) -> dict[str, Tensor]:
        """Of a micro-batch by its share of the samples, so that all micro-batches add up to the mean over them."""
        if self._losses.balance is None:
            return {}
        losses = router_losses(logits, (batch.is_token & batch.counted).flatten(), top_k=self.student.top_k)
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

    def _row_parts(self, hidden: Tensor, batch: Batch, totals: RowCounts) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of single rows: cross-entropy, response, visual, with their weights; and each without."""
        losses, tasks, parts = self._losses, [], {}
        if losses.cross_entropy > 0 or losses.response is not None:
            tasks += self._response_tasks(hidden, batch, 1 / max(1, totals.response))
        num_response_tasks = len(tasks)
        if losses.visual is not None:
            share = 1 / max(1, totals.visual)
            runs = [_resampled(rows, run.teacher) for run, rows in self._visual_rows(hidden, batch)]
            rows = torch.cat(runs) if runs else hidden[:0]
            target = self._target("visual", batch.visual)
            tasks.append(HeadTask(rows, None, target, weight=_weight(losses, "visual") * share))
        if not tasks:
            return hidden.new_zeros((), dtype=torch.float32), {}
        head = self.student.head
        loss, sums = fused_head_loss(
            head.weight, tasks, bias=head.bias, vocab_size=self.student.vocab_size, chunk_logits=self._chunk_logits
        )
        if losses.cross_entropy > 0:
            parts["cross_entropy"] = sums[0].cross_entropy / max(1, totals.response)
        if losses.response is not None:
            divergence = sum(each.divergence for each in sums[:num_response_tasks])
            parts["response"] = divergence / max(1, totals.response)
        if losses.visual is not None:
            parts["visual"] = sums[-1].divergence / max(1, totals.visual)
        return loss, parts

    def _response_tasks(self, hidden: Tensor, batch: Batch, share: float) -> list[HeadTask]:
        """Labels and teacher of the response rows; with `unshifted_mask` each for itself, of rows that differ."""
        rows = hidden.index_select(0, batch.response_positions)
        labels = batch.labels if self._losses.cross_entropy > 0 else None
        label_weight, weight = self._losses.cross_entropy * share, _weight(self._losses, "response") * share
        if not self._losses.unshifted_mask:
            target = self._target("response", batch.response, batch.hidden)
            return [HeadTask(rows, labels, target, label_weight=label_weight, weight=weight)]
        # The published mask also distils the row after each answer's last token, which no cache has; the sum is over
        # as many tokens as there.
        after_another = torch.ones_like(batch.response_positions, dtype=torch.bool)  # False: an answer's first row
        after_another[:1] = False
        after_another[1:] = batch.response_positions.diff() == 1
        kept = after_another.nonzero()[:, 0]
        target = self._target(
            "response",
            None if batch.response is None else batch.response.at(kept),
            None if batch.hidden is None else batch.hidden[kept],
        )
        of_labels = [] if labels is None else [HeadTask(rows, labels, label_weight=label_weight)]
        return [*of_labels, HeadTask(rows[kept], None, target, weight=weight)]

    def _relation_part(self, hidden: Tensor, batch: Batch, total: int) -> dict[str, Tensor]:
        if self._losses.relation is None:
            return {}
        runs = self._visual_rows(hidden, batch)
        metric = self._metric(self.student.head.weight)
        value = 0 * (hidden[:1].float().sum() + metric.sum())
        if self._losses.literal and len(runs) > 1:
            raise ConfigError("losses.literal is one cosine over a batch of equal images; set micro_batch: 1 for these")
        for (run, rows), teacher in zip(runs, batch.relation or (), strict=True):
            value = value + relation_loss(
                rows,
                metric,
                teacher,
                centered=self._teacher.centered,
                resampling=_matrix(run, rows.device, self._teacher.pool),
                literal=self._losses.literal,
            )
        return {"relation": value / max(1, total)}

    def _metric(self, weight: Tensor) -> Tensor:
        """W^T W; of a frozen head made once."""
        if weight.requires_grad:
            return head_metric(weight, vocab_size=self.student.vocab_size)
        if self._frozen_metric is None:
            self._frozen_metric = head_metric(weight, vocab_size=self.student.vocab_size)
        return self._frozen_metric

    def _target(
        self, name: str, rows: TeacherRows | None, hidden: Tensor | None = None
    ) -> SparseTarget | HiddenTarget | None:
        rule = self._rules[name]
        if rule.treatment == "exact" and hidden is not None:
            assert self._teacher.head is not None
            return HiddenTarget(hidden, self._teacher.head, rule)
        return None if rows is None else SparseTarget(rows, rule, self._profiles.get(name))

    def _visual_rows(self, hidden: Tensor, batch: Batch) -> list[tuple[ImageGrids, Float[Tensor, "i n d"]]]:
        """The student's visual rows of each run of images that are alike; none of a batch that is not counted."""
        if not batch.counted or not batch.grids:
            return []
        rows = hidden.index_select(0, batch.visual_positions)
        pieces = rows.split([run.num_images * run.student for run in batch.grids])
        return [
            (run, piece.view(run.num_images, run.student, -1)) for run, piece in zip(batch.grids, pieces, strict=True)
        ]


def _resampled(rows: Float[Tensor, "i n d"], num_teacher: int) -> Float[Tensor, "s d"]:
    """Visual rows on the teacher's grid, one image after another."""
    matrix = resampling(rows.shape[1], num_teacher)
    return (rows if matrix is None else (matrix.to(rows.device) @ rows.float()).to(rows.dtype)).flatten(0, 1)


def _matrix(run: ImageGrids, device: torch.device, pool: int | None) -> Tensor | None:
    matrix = resampling(run.student, run.teacher, pool=pool)
    return None if matrix is None else matrix.to(device)


def _rule(losses: LossesSection, teacher: CachedTeacher, name: str) -> Rule:
    section: DistributionLossSection | None = getattr(losses, name)
    if section is None:
        return Rule()
    temperatures = teacher.temperatures.get(name, ())
    column = temperatures.index(section.temperature) if section.temperature in temperatures else None
    treatment = teacher.treatments.get(name) or section.treatment
    if treatment == "auto":
        raise ValueError(f"{name}: the cache decides what 'auto' is; give CachedTeacher.treatments")
    return Rule(section.divergence, treatment, section.temperature, section.beta, column)


def _weight(losses: LossesSection, name: str) -> float:
    """What a part counts in the loss; 0 for one that is only watched."""
    if name in _WATCHED:
        return 0.0
    if name == "router_z":
        return losses.balance.z_weight if losses.balance else 0.0
    section = getattr(losses, name)
    if section is None:
        return 0.0
    if isinstance(section, BalanceLossSection):
        return section.weight * (2 if section.literal else 1)
    return section if isinstance(section, float | int) else section.weight


def part_names(losses: LossesSection) -> tuple[str, ...]:
    """The parts that these losses compute, in the order of `Objective.forward`."""
    names: list[str] = []
    for name in LossesSection.model_fields:
        if name not in _SWITCHES and getattr(losses, name):
            names += _PARTS.get(name, (name,))
    return tuple(names)


_SWITCHES = ("literal", "unshifted_mask")  # that change parts and are none
_PARTS = {  # of the sections that give more than one
    "balance": ("balance", "router_z", "router_entropy", "expert_load_max", "expert_load_min"),
    "preference": ("preference", "preference_won", "preference_margin"),
}
_WATCHED = ("router_entropy", "expert_load_max", "expert_load_min", "preference_won", "preference_margin")
