"""A student with its losses: a batch goes in, the loss and its parts come out. No logits of all tokens.

Legend: r rows, i images, n visual tokens of an image, m those of the teacher, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage.errors import ConfigError
from student_train.data.collate import Batch, ImageGrids
from student_train.losses.averaging import WeightedRows, weigh_images, weigh_rows
from student_train.losses.config import (
    LOSS_OPTIONS,
    BalanceLossSection,
    DistributionLossSection,
    LossesSection,
    Treatment,
)
from student_train.losses.fused_linear import HeadLossTask, HiddenTarget, SparseTarget, TeacherHead, fused_head_loss
from student_train.losses.load_balancing import router_losses
from student_train.losses.preference import Rewards, preference_loss
from student_train.losses.relation import compute_head_gram, make_resampling_matrix, relation_loss
from student_train.losses.row_counts import RowCounts
from student_train.losses.sparse_divergence import LossSpec, TailProfile, TeacherRows
from student_train.models.student import Student


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
    """The loss of a micro-batch as its share of the global batch's: see student_train.losses.averaging."""

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
            name: TailProfile.from_mass(profile, temperature=self._rules[name].temperature, dtype=torch.float32)
            for name, profile in teacher.profiles.items()
        }
        self._frozen_metric: Tensor | None = None

    def forward(self, batch: Batch, totals: RowCounts, largest: RowCounts) -> dict[str, Tensor]:
        """Each part as this micro-batch's share of it, detached, and their weighted sum `loss`.

        Parts of all micro-batches of all ranks add up to the global batch's means, over rows, samples or micro-batches
        as `losses.mean` says, by the counts in `totals`. `largest` fixes the number
        of calls of the head as a module, so that ranks that share parameters (ZeRO-3) move together; the fused
        head takes its weight once, however many rows a rank has. A loss whose total is 0 is 0.
        """
        hidden, routers = self._hidden(batch)
        loss, parts = self._row_parts(hidden, batch, totals)
        others = {
            **self._relation_part(hidden, batch, totals),
            **self._preference_part(hidden, batch, totals, largest.response),
            **self._router_parts(routers, batch, totals),
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

    def _router_parts(self, logits: Sequence[Tensor], batch: Batch, totals: RowCounts) -> dict[str, Tensor]:
        """Of a micro-batch by its share of the samples, or of the micro-batches, so that all add up to a mean."""
        section = self._losses.balance
        if section is None:
            return {}
        is_token, top_k = batch.is_token & batch.counted, self.student.top_k
        losses = router_losses(logits, is_token.flatten(), top_k=top_k, first_choice=section.literal)
        balance = losses.balance
        if section.literal and self._losses.preference:  # chosen and rejected answers alternate
            is_chosen = torch.arange(len(is_token), device=is_token.device)[:, None] % 2 == 0
            sides = [(is_token & (is_chosen == side)).flatten() for side in (True, False)]
            chosen, rejected = (router_losses(logits, side, top_k=top_k, first_choice=True) for side in sides)
            balance = chosen.balance + rejected.balance
        if self._losses.averaging == "micro_batch":
            share = batch.counted / max(1, totals.micro_batches)
        else:
            num_samples = len(batch.sample_ids) / (2 if self._losses.preference else 1)
            share = num_samples / max(1, totals.samples) * batch.counted
        return {
            "balance": balance * share,
            "router_z": losses.z * share,
            "router_entropy": losses.entropy * share,
            "expert_load_max": losses.load.amax(1).mean() * share,
            "expert_load_min": losses.load.amin(1).mean() * share,
        }

    def _preference_part(self, hidden: Tensor, batch: Batch, totals: RowCounts, largest: int) -> dict[str, Tensor]:
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
        value = preference_loss(rewards, section) + 0 * logprobs.sum()
        shares = {"preference": value, "preference_won": rewards.num_won.float(), "preference_margin": rewards.margin}
        divisor = max(1, totals.samples)
        if self._losses.averaging == "micro_batch":
            divisor = max(1, len(pairs)) * max(1, totals.micro_batches)
        return {name: share / divisor for name, share in shares.items()}

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
        shares: list[WeightedRows] = []  # of each task
        if losses.cross_entropy > 0 or losses.response is not None:
            counts = batch.response_counts.tolist() if batch.counted else []
            of_rows = weigh_rows(losses.averaging, counts, total_rows=totals.response, totals=totals)
            tasks, shares = self._response_tasks(hidden, batch, of_rows)
        num_response_tasks = len(tasks)
        if losses.visual is not None:
            runs = [_resampled(rows, run.teacher) for run, rows in self._visual_rows(hidden, batch)]
            rows = torch.cat(runs) if runs else hidden[:0]
            counts = batch.teacher_visual_counts if runs and losses.averaging == "samples" else [len(rows)]
            weight = _weight(losses, "visual")
            for share in weigh_rows(losses.averaging, counts, total_rows=totals.visual, totals=totals):
                target = self._target("visual", None if batch.visual is None else share.select(batch.visual))
                tasks.append(HeadLossTask(share.select(rows), None, target, weight=weight * share.value))
                shares.append(share)
        if not tasks:
            return hidden.new_zeros((), dtype=torch.float32), {}
        head = self.student.head
        loss, sums = fused_head_loss(
            head.weight, tasks, bias=head.bias, vocab_size=self.student.vocab_size, chunk_logits=self._chunk_logits
        )
        scaled = list(zip(sums, (share.value for share in shares), strict=True))
        of_response, of_visual = scaled[:num_response_tasks], scaled[num_response_tasks:]
        if losses.cross_entropy > 0:
            parts["cross_entropy"] = _total(each.cross_entropy * share for each, share in of_response)
        if losses.response is not None:
            parts["response"] = _total(each.divergence * share for each, share in of_response)
        if losses.visual is not None:
            parts["visual"] = _total(each.divergence * share for each, share in of_visual)
        return loss, parts

    def _response_tasks(
        self, hidden: Tensor, batch: Batch, shares: Sequence[WeightedRows]
    ) -> tuple[list[HeadLossTask], list[WeightedRows]]:
        """Labels and teacher of the response rows of each share, and the share of each task.

        With `unshifted_mask` labels and teacher are tasks of their own, since their rows differ.
        """
        rows = hidden.index_select(0, batch.response_positions)
        label_weight, weight = self._losses.cross_entropy, _weight(self._losses, "response")
        after_another = self._after_another(batch) if self._losses.unshifted_mask else None
        tasks, of_tasks = [], []
        for share in shares:
            labels = share.select(batch.labels) if self._losses.cross_entropy > 0 else None
            teacher = None if batch.response is None else share.select(batch.response)
            states = None if batch.hidden is None else share.select(batch.hidden)
            if after_another is None:
                target = self._target("response", teacher, states)
                factors = {"label_weight": label_weight * share.value, "weight": weight * share.value}
                tasks.append(HeadLossTask(share.select(rows), labels, target, **factors))
                of_tasks.append(share)
                continue
            if labels is not None:
                tasks.append(HeadLossTask(share.select(rows), labels, label_weight=label_weight * share.value))
                of_tasks.append(share)
            kept = share.select(after_another).nonzero()[:, 0]
            target = self._target(
                "response",
                None if teacher is None else teacher.select_rows(kept),
                None if states is None else states[kept],
            )
            tasks.append(HeadLossTask(share.select(rows)[kept], None, target, weight=weight * share.value))
            of_tasks.append(share)
        return tasks, of_tasks

    @staticmethod
    def _after_another(batch: Batch) -> Bool[Tensor, " r"]:
        """False for the first row of each answer, which the published, unshifted mask does not distil.

        It also distils the row after each answer's last token, which no cache has; the mean is over as many tokens.
        """
        after_another = torch.ones_like(batch.response_positions, dtype=torch.bool)
        after_another[:1] = False
        after_another[1:] = batch.response_positions.diff() == 1
        return after_another

    def _relation_part(self, hidden: Tensor, batch: Batch, totals: RowCounts) -> dict[str, Tensor]:
        if self._losses.relation is None:
            return {}
        runs = self._visual_rows(hidden, batch)
        metric = self._metric(self.student.head.weight)
        value = 0 * (hidden[:1].float().sum() + metric.sum())
        if self._losses.literal and len(runs) > 1:
            raise ConfigError("losses.literal is one cosine over a batch of equal images; set micro_batch: 1 for these")
        weights = weigh_images(self._losses.averaging, batch.image_counts if runs else (), totals=totals)
        start = 0
        for (run, rows), teacher in zip(runs, batch.relation or (), strict=True):
            value = value + relation_loss(
                rows,
                metric,
                teacher,
                weights=rows.new_tensor(weights[start : start + run.num_images], dtype=torch.float32),
                centered=self._teacher.centered,
                resampling=_matrix(run, rows.device, self._teacher.pool),
                literal=self._losses.literal,
            )
            start += run.num_images
        return {"relation": value}

    def _metric(self, weight: Tensor) -> Tensor:
        """W^T W; of a frozen head made once."""
        if weight.requires_grad:
            return compute_head_gram(weight, vocab_size=self.student.vocab_size)
        if self._frozen_metric is None:
            self._frozen_metric = compute_head_gram(weight, vocab_size=self.student.vocab_size)
        return self._frozen_metric

    def _target(
        self, name: str, rows: TeacherRows | None, hidden: Tensor | None = None
    ) -> SparseTarget | HiddenTarget | None:
        spec = self._rules[name]
        if spec.treatment == "exact" and hidden is not None:
            assert self._teacher.head is not None
            return HiddenTarget(hidden, self._teacher.head, spec)
        return None if rows is None else SparseTarget(rows, spec, self._profiles.get(name))

    def _visual_rows(self, hidden: Tensor, batch: Batch) -> list[tuple[ImageGrids, Float[Tensor, "i n d"]]]:
        """The student's visual rows of each run of images that are alike; none of a batch that is not counted."""
        if not batch.counted or not batch.grids:
            return []
        rows = hidden.index_select(0, batch.visual_positions)
        pieces = rows.split([run.num_images * run.student for run in batch.grids])
        return [
            (run, piece.view(run.num_images, run.student, -1)) for run, piece in zip(batch.grids, pieces, strict=True)
        ]


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _resampled(rows: Float[Tensor, "i n d"], num_teacher: int) -> Float[Tensor, "s d"]:
    """Visual rows on the teacher's grid, one image after another."""
    matrix = make_resampling_matrix(rows.shape[1], num_teacher)
    return (rows if matrix is None else (matrix.to(rows.device) @ rows.float()).to(rows.dtype)).flatten(0, 1)


def _matrix(run: ImageGrids, device: torch.device, pool: int | None) -> Tensor | None:
    matrix = make_resampling_matrix(run.student, run.teacher, pool=pool)
    return None if matrix is None else matrix.to(device)


def _rule(losses: LossesSection, teacher: CachedTeacher, name: str) -> LossSpec:
    section: DistributionLossSection | None = getattr(losses, name)
    if section is None:
        return LossSpec()
    temperatures = teacher.temperatures.get(name, ())
    column = temperatures.index(section.temperature) if section.temperature in temperatures else None
    treatment = teacher.treatments.get(name) or section.treatment
    if treatment == "auto":
        raise ValueError(f"{name}: the cache decides what 'auto' is; give CachedTeacher.treatments")
    return LossSpec(section.divergence, treatment, section.temperature, section.beta, column)


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
        if name not in LOSS_OPTIONS and getattr(losses, name):
            names += _PARTS.get(name, (name,))
    return tuple(names)


_PARTS = {  # of the sections that give more than one
    "balance": ("balance", "router_z", "router_entropy", "expert_load_max", "expert_load_min"),
    "preference": ("preference", "preference_won", "preference_margin"),
}
_WATCHED = ("router_entropy", "expert_load_max", "expert_load_min", "preference_won", "preference_margin")
