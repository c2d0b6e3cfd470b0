"""The training objective: computes the loss of a batch and its parts, without logits of all tokens in memory.

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
from student_train.data.collate import Batch, ImageRun
from student_train.losses.averaging import WeightedRows, weigh_images, weigh_rows
from student_train.losses.config import (
    LOSS_OPTIONS,
    BalanceLossSection,
    DistributionLossSection,
    LossesSection,
    Treatment,
)
from student_train.losses.fused_linear import HeadLossTask, fused_head_loss
from student_train.losses.head_products import TeacherHead
from student_train.losses.load_balancing import router_losses
from student_train.losses.preference import Rewards, preference_loss
from student_train.losses.relation import compute_head_gram, make_resampling_matrix, relation_loss
from student_train.losses.row_counts import RowCounts
from student_train.losses.sparse_divergence import LossSpec, TailProfile, TeacherRows
from student_train.models.student import Student


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """The settings and tensors of a cache that losses need besides its rows."""

    centered: bool = False  # whether relation matrices are centered
    pool: int | None = None  # side of the blocks of a grid that relation rows are averaged over
    treatments: Mapping[str, Treatment] = field(default_factory=dict)  # by family; needed where the loss says `auto`
    temperatures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of each family's stored log-sum-exp
    profiles: Mapping[str, Tensor] = field(default_factory=dict)  # (v,) of families with treatment `profile`
    head: TeacherHead | None = None  # for treatment `exact`

    def to(self, device: torch.device) -> CachedTeacher:
        """Return the same settings with tensors on another device."""
        head = self.head
        if head is not None:
            head = replace(
                head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device)
            )
        return replace(self, head=head, profiles={name: each.to(device) for name, each in self.profiles.items()})


class Objective(nn.Module):
    """Computes a micro-batch's share of the global batch's loss; see student_train.losses.averaging."""

    def __init__(self, student: Student, losses: LossesSection, teacher: CachedTeacher, *, chunk_logits: int) -> None:
        """`teacher`: on the student's device. `chunk_logits`: logits in memory at once."""
        super().__init__()
        self.student = student
        self._losses = losses
        self._teacher = teacher
        self._chunk_logits = chunk_logits
        self._rows_per_chunk = max(
            1, chunk_logits // student.vocab_size
        )  # where the head is called as a module, not fused
        self._specs = {name: _make_spec(losses, teacher, name) for name in ("response", "visual")}
        self._frozen_gram: Tensor | None = None

    def forward(self, batch: Batch, totals: RowCounts, largest: RowCounts) -> dict[str, Tensor]:
        """Compute this micro-batch's share of each part, detached, and the weighted sum `loss`.

        The shares of all micro-batches of all ranks add up to the global batch's means, over rows, samples or
        micro-batches as `losses.mean` says, by the counts in `totals`. `largest` fixes the number of calls of the
        head as a module, so that ranks that shard parameters (ZeRO-3) stay in step; the fused head reads its weight
        once, for any number of rows. A loss whose total count is 0 is 0.
        """
        hidden, routers = self._compute_hidden(batch)
        loss, parts = self._compute_row_parts(hidden, batch, totals)
        others = {
            **self._compute_relation_part(hidden, batch, totals),
            **self._compute_preference_part(hidden, batch, totals, largest.response),
            **self._compute_router_parts(routers, batch, totals),
        }
        for name, part in others.items():
            loss = loss + _get_weight(self._losses, name) * part
            parts[name] = part.detach()
        return {"loss": loss + 0 * hidden.float().sum(), **parts}

    def _compute_hidden(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = batch.input_ids, batch.visual_positions, batch.vision
        if self._losses.balance is None:
            return self.student.compute_hidden(*inputs), ()
        return self.student.compute_hidden_and_routers(*inputs)

    def _compute_router_parts(self, logits: Sequence[Tensor], batch: Batch, totals: RowCounts) -> dict[str, Tensor]:
        """Compute router losses, weighted by the micro-batch's share of the samples, or of the micro-batches."""
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

    def _compute_preference_part(
        self, hidden: Tensor, batch: Batch, totals: RowCounts, largest: int
    ) -> dict[str, Tensor]:
        section = self._losses.preference
        if section is None:
            return {}
        rows = hidden.index_select(0, batch.response_positions)
        logprobs = self._compute_label_logprobs(rows, batch.labels, largest)
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

    def _compute_label_logprobs(self, rows: Tensor, labels: Tensor, largest: int) -> Float[Tensor, " r"]:
        """Compute log q(label) of each row, chunk by chunk."""

        def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
            return -F.cross_entropy(self.student.compute_logits(hidden).float(), labels, reduction="none")

        chunks = []
        for start, stop in self._split_rows(rows.shape[0], largest):
            chunks.append(checkpoint(of_chunk, rows[start:stop], labels[start:stop], use_reentrant=False))
        return torch.cat(chunks)

    def _split_rows(self, num_rows: int, largest: int) -> list[tuple[int, int]]:
        """Split rows into ranges, the same number on every rank; some may be empty."""
        per_chunk = self._rows_per_chunk
        num_chunks = max(1, -(-max(largest, num_rows) // per_chunk))
        return [(min(n * per_chunk, num_rows), min((n + 1) * per_chunk, num_rows)) for n in range(num_chunks)]

    def _compute_row_parts(self, hidden: Tensor, batch: Batch, totals: RowCounts) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the losses of single rows (cross-entropy, response, visual): weighted sum and unweighted parts."""
        losses, tasks, parts = self._losses, [], {}
        shares: list[WeightedRows] = []  # of each task
        if losses.cross_entropy > 0 or losses.response is not None:
            counts = batch.response_counts.tolist() if batch.counted else []
            of_rows = weigh_rows(losses.averaging, counts, total_rows=totals.response, totals=totals)
            tasks, shares = self._make_response_tasks(hidden, batch, of_rows)
        num_response_tasks = len(tasks)
        if losses.visual is not None:
            runs = [_resample(rows, run.teacher) for run, rows in self._split_visual_rows(hidden, batch)]
            rows = torch.cat(runs) if runs else hidden[:0]
            counts = batch.teacher_visual_counts if runs and losses.averaging == "samples" else [len(rows)]
            weight = _get_weight(losses, "visual")
            teacher, spec = self._get_teacher(batch, "visual"), self._specs["visual"]
            for share in weigh_rows(losses.averaging, counts, total_rows=totals.visual, totals=totals):
                of_share = None if teacher is None else teacher[share.rows]
                tasks.append(HeadLossTask(rows[share.rows], None, of_share, spec, weight=weight * share.weight))
                shares.append(share)
        if not tasks:
            return hidden.new_zeros((), dtype=torch.float32), {}
        head = self.student.head
        loss, sums = fused_head_loss(
            head.weight, tasks, bias=head.bias, vocab_size=self.student.vocab_size, chunk_logits=self._chunk_logits
        )
        scaled = list(zip(sums, (share.weight for share in shares), strict=True))
        of_response, of_visual = scaled[:num_response_tasks], scaled[num_response_tasks:]
        if losses.cross_entropy > 0:
            parts["cross_entropy"] = _sum(each.cross_entropy * share for each, share in of_response)
        if losses.response is not None:
            parts["response"] = _sum(each.divergence * share for each, share in of_response)
        if losses.visual is not None:
            parts["visual"] = _sum(each.divergence * share for each, share in of_visual)
        return loss, parts

    def _make_response_tasks(
        self, hidden: Tensor, batch: Batch, shares: Sequence[WeightedRows]
    ) -> tuple[list[HeadLossTask], list[WeightedRows]]:
        """Make the head-loss tasks of the response rows of each share; also return each task's share.

        With `unshifted_mask` labels and teacher need separate tasks, since their rows differ.
        """
        rows, teacher = hidden.index_select(0, batch.response_positions), self._get_teacher(batch, "response")
        label_weight, weight = self._losses.cross_entropy, _get_weight(self._losses, "response")
        spec = self._specs["response"]
        after_another = self._find_rows_after_first(batch) if self._losses.unshifted_mask else None
        tasks, of_tasks = [], []
        for share in shares:
            ours, theirs = rows[share.rows], None if teacher is None else teacher[share.rows]
            labels = batch.labels[share.rows] if label_weight > 0 else None
            scaled = {"label_weight": label_weight * share.weight, "weight": weight * share.weight}
            if after_another is None:
                tasks.append(HeadLossTask(ours, labels, theirs, spec, **scaled))
                of_tasks.append(share)
                continue
            if labels is not None:
                tasks.append(HeadLossTask(ours, labels, None, spec, **scaled))
                of_tasks.append(share)
            kept = after_another[share.rows].nonzero()[:, 0]
            theirs = None if theirs is None else theirs[kept]
            tasks.append(HeadLossTask(ours[kept], None, theirs, spec, **scaled))
            of_tasks.append(share)
        return tasks, of_tasks

    @staticmethod
    def _find_rows_after_first(batch: Batch) -> Bool[Tensor, " r"]:
        """Return False for the first row of each answer, which the published, unshifted mask does not distil.

        That mask also distils the row after each answer's last token, which no cache holds; the mean is over the
        same number of tokens.
        """
        after_another = torch.ones_like(batch.response_positions, dtype=torch.bool)
        after_another[:1] = False
        after_another[1:] = batch.response_positions.diff() == 1
        return after_another

    def _compute_relation_part(self, hidden: Tensor, batch: Batch, totals: RowCounts) -> dict[str, Tensor]:
        if self._losses.relation is None:
            return {}
        runs = self._split_visual_rows(hidden, batch)
        head_gram = self._compute_gram(self.student.head.weight)
        value = 0 * (hidden[:1].float().sum() + head_gram.sum())
        if self._losses.literal and len(runs) > 1:
            raise ConfigError(
                "losses.literal takes one cosine over a micro-batch, but its images differ in their numbers of visual "
                "tokens; set micro_batch: 1"
            )
        weights = weigh_images(self._losses.averaging, batch.image_counts if runs else (), totals=totals)
        start = 0
        for (run, rows), teacher in zip(runs, batch.relation or (), strict=True):
            value = value + relation_loss(
                rows,
                head_gram,
                teacher,
                weights=rows.new_tensor(weights[start : start + run.num_images], dtype=torch.float32),
                centered=self._teacher.centered,
                resampling=_make_matrix(run, rows.device, self._teacher.pool),
                literal=self._losses.literal,
            )
            start += run.num_images
        return {"relation": value}

    def _compute_gram(self, weight: Tensor) -> Tensor:
        """Compute W^T W; only once for a frozen head."""
        if weight.requires_grad:
            return compute_head_gram(weight, vocab_size=self.student.vocab_size)
        if self._frozen_gram is None:
            self._frozen_gram = compute_head_gram(weight, vocab_size=self.student.vocab_size)
        return self._frozen_gram

    def _get_teacher(self, batch: Batch, name: str) -> TeacherRows | Tensor | None:
        """Return the teacher's rows of a family, or the states that its head turns into rows."""
        return batch.hidden if self._specs[name].treatment == "exact" else getattr(batch, name)

    def _split_visual_rows(self, hidden: Tensor, batch: Batch) -> list[tuple[ImageRun, Float[Tensor, "i n d"]]]:
        """Split the student's visual rows by image run; empty for a batch that is not counted."""
        if not batch.counted or not batch.image_runs:
            return []
        rows = hidden.index_select(0, batch.visual_positions)
        pieces = rows.split([run.num_images * run.student for run in batch.image_runs])
        return [
            (run, piece.view(run.num_images, run.student, -1))
            for run, piece in zip(batch.image_runs, pieces, strict=True)
        ]


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _resample(rows: Float[Tensor, "i n d"], num_teacher: int) -> Float[Tensor, "s d"]:
    """Resample visual rows to the teacher's grid; return those of all images, concatenated."""
    matrix = make_resampling_matrix(rows.shape[1], num_teacher)
    return (rows if matrix is None else (matrix.to(rows.device) @ rows.float()).to(rows.dtype)).flatten(0, 1)


def _make_matrix(run: ImageRun, device: torch.device, pool: int | None) -> Tensor | None:
    matrix = make_resampling_matrix(run.student, run.teacher, pool=pool)
    return None if matrix is None else matrix.to(device)


def _make_spec(losses: LossesSection, teacher: CachedTeacher, name: str) -> LossSpec:
    section: DistributionLossSection | None = getattr(losses, name)
    if section is None:
        return LossSpec()
    temperatures = teacher.temperatures.get(name, ())
    column = temperatures.index(section.temperature) if section.temperature in temperatures else None
    treatment = teacher.treatments.get(name) or section.treatment
    if treatment == "auto":
        raise ValueError(f"{name}: treatment 'auto' depends on the cache; give CachedTeacher.treatments")
    profile = teacher.profiles.get(name)
    if profile is not None:
        profile = TailProfile.from_mass(profile, temperature=section.temperature, dtype=torch.float32)
    return LossSpec(section.divergence, treatment, section.temperature, section.beta, column, profile, teacher.head)


def _get_weight(losses: LossesSection, name: str) -> float:
    """Return the weight of a part in the loss; 0 for a part that is only logged."""
    if name in _LOGGED_ONLY:
        return 0.0
    if name == "router_z":
        return losses.balance.z_weight if losses.balance else 0.0
    section = getattr(losses, name)
    if section is None:
        return 0.0
    if isinstance(section, BalanceLossSection):
        return section.weight * (2 if section.literal else 1)
    return section if isinstance(section, float | int) else section.weight


def list_part_names(losses: LossesSection) -> tuple[str, ...]:
    """Return the names of the parts that these losses compute, in the order of `Objective.forward`."""
    names: list[str] = []
    for name in LossesSection.model_fields:
        if name not in LOSS_OPTIONS and getattr(losses, name):
            names += _PARTS.get(name, (name,))
    return tuple(names)


_PARTS = {  # of sections that compute more than one part
    "balance": ("balance", "router_z", "router_entropy", "expert_load_max", "expert_load_min"),
    "preference": ("preference", "preference_won", "preference_margin"),
}
_LOGGED_ONLY = ("router_entropy", "expert_load_max", "expert_load_min", "preference_won", "preference_margin")
