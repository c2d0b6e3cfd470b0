"""Losses of logits against labels and cached teacher rows: sums in nats, with gradients computed in place.

Legend: r rows, v vocabulary, e stored entries of all rows together, o = r + 1.
Logits have the computing dtype (float32, or float64 in tests) and are overwritten by their gradient, so that nothing
else of their size is kept. The caller divides by the number of rows of the global batch.

The stored entries of a row are taken out of it and handled in logarithms; the other logits are exponentiated relative
to their own maximum. So precision holds even if the teacher or the student leaves no mass to the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_train.losses.config import Divergence, Treatment
from student_train.losses.divergences import LINEAR, EventLoss, select_event_loss
from student_train.losses.head_products import TeacherHead

MIN_TAIL_MASS = 2.0**-24  # float32 resolution next to 1: a tail mass of 0 is treated as this
PROFILE_FLOOR = 1e-3  # share of a tail profile that is spread evenly, so that no token has probability 0
_BLOCK = {"cpu": 1 << 20}  # elements of logits computed on at once: fits a core's cache; elsewhere few kernels
_BLOCK_ELSEWHERE = 1 << 26


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Rows of the teacher on a device, in CSR form, with the fields of storage.records.sparse_rows.SparseRows.

    A batch holds them as a cache stores them; `handle_tails` returns them as a loss reads them.
    """

    offsets: Int[Tensor, " o"]
    ids: Int[Tensor, " e"]
    logprobs: Float[Tensor, " e"]  # exact entries: log p, descending; then sampled entries: log of their weight
    num_exact: Int[Tensor, " r"]
    tail_mass: Float[Tensor, " r"]
    entropy: Float[Tensor, " r"]  # nats, of the full distribution
    log_sum_exp: Float[Tensor, "r t"]  # of log p / T at each of the cache's t temperatures T besides 1

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.num_exact.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " s"]) -> TeacherRows:
        """Return a range of rows, or the rows of some indices, in that order."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.num_rows)
            first, last = self.offsets[[start, stop]].tolist()
            entries, offsets = slice(first, last), self.offsets[start : stop + 1] - first
        else:
            counts = self.offsets.diff()[rows]
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            starts = (self.offsets[:-1][rows] - offsets[:-1]).repeat_interleave(counts)
            entries = starts + torch.arange(len(starts), device=starts.device)
        return TeacherRows(
            offsets=offsets,
            ids=self.ids[entries],
            logprobs=self.logprobs[entries],
            num_exact=self.num_exact[rows],
            tail_mass=self.tail_mass[rows],
            entropy=self.entropy[rows],
            log_sum_exp=self.log_sum_exp[rows],
        )

    def row_of_entry(self) -> Int[Tensor, " e"]:
        """Return the index of the row that each entry belongs to."""
        rows = torch.arange(self.num_rows, device=self.ids.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.ids.shape[0])

    def is_exact(self) -> Bool[Tensor, " e"]:
        """Return True for exact entries and False for sampled ones."""
        row = self.row_of_entry()
        return torch.arange(row.shape[0], device=row.device) - self.offsets[row] < self.num_exact[row]

    def to(self, device: torch.device) -> TeacherRows:
        """Return the same rows on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return TeacherRows(**moved)


@dataclass(frozen=True, eq=False)
class TailProfile:
    """The mean distribution of tokens outside the stored sets, at a loss's temperature."""

    mass: Float[Tensor, " v"]
    log_mass: Float[Tensor, " v"]
    exact_log_mass: Float[Tensor, " v"]  # float64: 1 minus the mass of stored tokens would lose digits in float32

    @staticmethod
    def from_mass(profile: Float[Tensor, " v"], *, temperature: float = 1.0, dtype: torch.dtype) -> TailProfile:
        """Normalise a profile, mix in `PROFILE_FLOOR` evenly, and apply the temperature (p^(1/T))."""
        wide = profile.double()
        log_mass = ((1 - PROFILE_FLOOR) * wide / wide.sum() + PROFILE_FLOOR / len(wide)).log() / temperature
        exact = log_mass.log_softmax(0)
        return TailProfile(exact.exp().to(dtype), exact.to(dtype), exact)


@dataclass(frozen=True)
class LossSpec:
    """How a loss reads the teacher's rows: divergence, tail handling, temperature, and what these need of a cache.

    The first four fields are those of DistributionLossSection. Temperature T applies to teacher and student, and the
    loss is multiplied by T^2 so that gradients keep their size.
    """

    divergence: Divergence = "forward_kl"
    treatment: Treatment = "bucket"
    temperature: float = 1.0
    beta: float | None = None
    column: int | None = None  # column of log_sum_exp that belongs to this temperature
    profile: TailProfile | None = None  # for treatment `profile`, at this temperature
    head: TeacherHead | None = None  # for treatment `exact`

    @property
    def event_loss(self) -> EventLoss:
        """The divergence's function of one event."""
        return select_event_loss(self.divergence, self.beta)


BUCKET_SPEC = LossSpec()


def handle_tails(teacher: TeacherRows, spec: LossSpec, *, vocab_size: int, dtype: torch.dtype) -> TeacherRows:
    """Return rows whose entries are the events of single tokens, as the spec's treatment requires, in `dtype`.

    `tail_mass` becomes the teacher's mass of all other tokens together; 0: they are no event. `exact` has no stored
    rows.
    """
    nothing = torch.zeros_like(teacher.tail_mass, dtype=dtype)
    if spec.treatment == "unbiased":
        return replace(teacher, logprobs=teacher.logprobs.to(dtype), tail_mass=nothing)
    exact = teacher.is_exact()
    row, log_p = teacher.row_of_entry()[exact], teacher.logprobs[exact].to(dtype)
    if spec.temperature != 1:
        log_p = log_p / spec.temperature
        if spec.treatment != "renormalise":
            assert spec.column is not None
            log_p = log_p - teacher.log_sum_exp[:, spec.column].to(dtype)[row]
    head = torch.zeros_like(nothing).index_add_(0, row, log_p.exp())
    if spec.treatment == "renormalise":
        log_p = log_p - head.log()[row]
    if spec.treatment in ("truncate", "renormalise"):
        rest = nothing
    else:
        if spec.temperature == 1:
            rest = teacher.tail_mass.to(dtype)
        else:  # rounding may have raised the sum of the entries above 1
            log_p = log_p - head.clamp_min(1).log()[row]
            rest = 1 - head.clamp_max(1)
        if spec.divergence == "reverse_kl":
            rest = rest.clamp_min(MIN_TAIL_MASS)
        rest = rest * (teacher.num_exact < vocab_size)
    offsets = torch.cat([teacher.offsets[:1], teacher.num_exact.cumsum(0)])
    return replace(teacher, offsets=offsets, ids=teacher.ids[exact], logprobs=log_p, tail_mass=rest)


@dataclass(frozen=True, eq=False)
class RowSums:
    """Unweighted sums of both losses over rows, in nats."""

    cross_entropy: Float[Tensor, ""]
    divergence: Float[Tensor, ""]

    def __add__(self, other: RowSums) -> RowSums:
        return RowSums(self.cross_entropy + other.cross_entropy, self.divergence + other.divergence)


def differentiate_rows_(
    logits: Float[Tensor, "r v"],
    labels: Int[Tensor, " r"] | None = None,
    teacher: TeacherRows | Float[Tensor, "r v"] | None = None,
    spec: LossSpec = BUCKET_SPEC,
    *,
    label_weight: float = 1.0,
    weight: float = 1.0,
    gradient: bool = True,
) -> RowSums:
    """Return the sums of -log q(label) and of the divergence; overwrite logits with the gradient of both, weighted.

    `teacher`: stored rows, or the teacher's logits. Without `gradient` the content of the logits is undefined
    afterwards. Computes one block of rows at a time.
    """
    num_rows, vocab_size = logits.shape
    if teacher is None:
        teacher, spec = _make_empty_rows(logits), BUCKET_SPEC
    elif isinstance(teacher, TeacherRows):
        teacher = handle_tails(teacher, spec, vocab_size=vocab_size, dtype=logits.dtype)
    sums = RowSums(*logits.new_zeros(2).unbind())
    step = max(1, _BLOCK.get(logits.device.type, _BLOCK_ELSEWHERE) // vocab_size)
    weights = (label_weight, weight)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        block, part, of_block = logits[rows], teacher[rows], None if labels is None else labels[rows]
        if of_block is not None and spec.temperature != 1:  # two softmaxes
            other = block.clone()
            sums += _differentiate_block_(other, None, part, spec, weights, gradient)
            sums += _differentiate_block_(block, of_block, _make_empty_rows(block), BUCKET_SPEC, weights, gradient)
            block += other
        else:
            sums += _differentiate_block_(block, of_block, part, spec, weights, gradient)
    return sums


def measure_rows_(
    logits: Float[Tensor, "r v"], labels: Int[Tensor, " r"], teacher: TeacherRows
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Return each row's -log q(label) and its forward KL, where all tokens that are not stored exactly are one event.

    The values whose sums `differentiate_rows_` returns by default. The content of the logits is undefined afterwards.
    """
    num_rows, vocab_size = logits.shape
    teacher = handle_tails(teacher, BUCKET_SPEC, vocab_size=vocab_size, dtype=logits.dtype)
    step = max(1, _BLOCK.get(logits.device.type, _BLOCK_ELSEWHERE) // vocab_size)
    surprises, divergences = [logits.new_zeros(0)], [logits.new_zeros(0)]
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        z, part = logits[rows], teacher[rows]
        counts, ids, row = part.offsets.diff(), part.ids, part.row_of_entry()
        stored, at_label = z[row, ids], z.gather(1, labels[rows, None])[:, 0]
        _, log_rest = _sum_others_(z, row, ids)
        log_z = torch.logaddexp(log_rest, _log_sum_exp_entries(stored, counts))
        value, _ = BUCKET_SPEC.event_loss(part.logprobs, stored - log_z[row])
        rest_value, _ = BUCKET_SPEC.event_loss(part.tail_mass.log(), log_rest - log_z)
        surprises.append(log_z - at_label)
        divergences.append(_sum_entries(value, counts) + rest_value)
    return torch.cat(surprises), torch.cat(divergences)


def _make_empty_rows(logits: Tensor) -> TeacherRows:
    """Return a row without events for each row of logits."""
    zeros = logits.new_zeros(len(logits))
    offsets = torch.zeros(len(logits) + 1, dtype=torch.int64, device=logits.device)
    return TeacherRows(offsets, offsets[:0], zeros[:0], offsets[1:], zeros, zeros, zeros[:, None])


def _differentiate_block_(
    z: Tensor,
    labels: Tensor | None,
    teacher: TeacherRows | Tensor,
    spec: LossSpec,
    weights: tuple[float, float],
    gradient: bool,
) -> RowSums:
    if spec.temperature != 1:
        z /= spec.temperature
    label_weight, weight = weights
    weights = (0.0 if labels is None else label_weight, weight * spec.temperature)
    # Below temperature 1 a profile's floor is raised to a power above 1; the other tokens' mass may underflow.
    is_linear = spec.divergence in LINEAR and spec.temperature >= 1
    if isinstance(teacher, TeacherRows) and (spec.treatment != "profile" or is_linear):
        sums = _differentiate_events_(z, labels, teacher, spec, weights, gradient)
    else:
        sums = _differentiate_dense_(z, labels, _make_dense_log_p(teacher, spec), spec.event_loss, weights, gradient)
    return RowSums(sums.cross_entropy, sums.divergence * spec.temperature**2)


def _differentiate_events_(
    z: Tensor,
    labels: Tensor | None,
    teacher: TeacherRows,
    spec: LossSpec,
    weights: tuple[float, float],
    gradient: bool,
) -> RowSums:
    """Differentiate rows whose other tokens share one event, or a profile that the loss is linear in."""
    profile = spec.profile if spec.treatment == "profile" else None
    counts, ids, row = teacher.offsets.diff(), teacher.ids, teacher.row_of_entry()
    spread = teacher.tail_mass  # over the profile, if there is one
    stored = z[row, ids]  # (e,)
    at_label = None if labels is None else z.gather(1, labels[:, None])[:, 0]
    scale = dot = None
    if profile is not None:
        scale = _scale_profile(spread, profile, ids, counts)
        z[row, ids] = 0
        dot = z @ profile.mass
    rest, log_rest = _sum_others_(z, row, ids)
    log_z = torch.logaddexp(log_rest, _log_sum_exp_entries(stored, counts))
    log_q, log_q_rest = stored - log_z[row], log_rest - log_z

    function = select_event_loss("cross_entropy") if spec.treatment == "unbiased" else spec.event_loss
    value, slope = function(teacher.logprobs, log_q)
    log_p_rest = torch.zeros_like(spread).log() if profile is not None else teacher.tail_mass.log()
    rest_value, rest_slope = function(log_p_rest, log_q_rest)
    total = value.sum() + rest_value.sum()
    if spec.treatment == "unbiased" and spec.divergence == "forward_kl":
        total = total - teacher.entropy.to(z.dtype).sum()
    slopes = _sum_entries(slope, counts) + rest_slope  # (r,)
    if profile is not None:
        assert scale is not None and dot is not None  # noqa: PT018
        total = total + (spread * log_z - scale * dot).sum()
        slopes -= spread
        if spec.divergence == "forward_kl":
            total = total + _sum_spread_p_log_p(teacher, profile, scale, counts)
    surprise = total.new_zeros(()) if at_label is None else (log_z - at_label).sum()
    if gradient:
        label_weight, weight = weights
        common = label_weight - weight * slopes  # of q
        factor = (weight * rest_slope + log_q_rest.exp() * common) / rest
        z *= torch.where(rest > 0, factor, 0)[:, None]
        if profile is not None:
            assert scale is not None
            z.addr_(scale, profile.mass, alpha=-weight)
        z[row, ids] = weight * slope + log_q.exp() * common[row]
        if labels is not None:
            z.scatter_add_(1, labels[:, None], z.new_full((len(z), 1), -label_weight))
    return RowSums(surprise, total)


def _sum_others_(z: Tensor, row: Tensor, ids: Tensor) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Return the sum of exp(z) over tokens that are not stored: relative to their maximum, and as a logarithm.

    Overwrites z with those exponentials, which are 0 for stored tokens.
    """
    z[row, ids] = -torch.inf
    top = z.amax(1)
    top.masked_fill_(top == -torch.inf, 0)
    rest = z.sub_(top[:, None]).exp_().sum(1)
    return rest, top + rest.log()


def _differentiate_dense_(
    z: Tensor,
    labels: Tensor | None,
    log_p: Float[Tensor, "r v"],
    function: EventLoss,
    weights: tuple[float, float],
    gradient: bool,
) -> RowSums:
    """Differentiate rows in which every token is an event."""
    at_label = None if labels is None else z.gather(1, labels[:, None])[:, 0]
    log_z = z.logsumexp(1)
    surprise = z.new_zeros(()) if at_label is None else (log_z - at_label).sum()
    log_q = z.sub_(log_z[:, None])
    value, slope = function(log_p, log_q)
    if gradient:
        label_weight, weight = weights
        common = label_weight - weight * slope.sum(1)
        z.exp_().mul_(common[:, None]).add_(slope, alpha=weight)
        if labels is not None:
            z.scatter_add_(1, labels[:, None], z.new_full((len(z), 1), -label_weight))
    return RowSums(surprise, value.sum())


def _make_dense_log_p(teacher: TeacherRows | Tensor, spec: LossSpec) -> Float[Tensor, "r v"]:
    """Return the teacher's log-probabilities of all tokens, at the spec's temperature."""
    if isinstance(teacher, Tensor):
        return (teacher / spec.temperature).log_softmax(1)
    assert spec.profile is not None
    row = teacher.row_of_entry()
    rows = spec.profile.log_mass.repeat(teacher.num_rows, 1)
    rows[row, teacher.ids] = -torch.inf
    rows = rows.log_softmax(1).add_(teacher.tail_mass.log()[:, None])
    rows[row, teacher.ids] = teacher.logprobs
    return rows


def _scale_profile(spread: Tensor, profile: TailProfile, ids: Tensor, counts: Tensor) -> Float[Tensor, " r"]:
    """Return the factor that scales the profile to the teacher's mass of tokens that are not stored."""
    outside = 1 - _sum_entries(profile.exact_log_mass[ids].exp(), counts)
    return torch.where(spread > 0, spread / outside, 0).to(spread.dtype)


def _sum_spread_p_log_p(teacher: TeacherRows, profile: TailProfile, scale: Tensor, counts: Tensor) -> Tensor:
    """Sum t log t over rows and tokens that are not stored, with t = scale * profile."""
    mass_log = profile.exact_log_mass.exp() * profile.exact_log_mass
    outside = (mass_log.sum() - _sum_entries(mass_log[teacher.ids], counts)).to(scale.dtype)
    return (torch.special.xlogy(teacher.tail_mass, scale) + scale * outside).sum()


def _sum_entries(values: Float[Tensor, " e"], counts: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Sum each row's entries, always in the same order, so that repeated runs are bit-identical."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True, initial=0)


def _log_sum_exp_entries(values: Float[Tensor, " e"], counts: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Return log(sum(exp)) of each row's entries; minus infinity for a row without entries."""
    top = torch.segment_reduce(values, "max", lengths=counts, unsafe=True, initial=-torch.inf)
    top = torch.where(top == -torch.inf, 0, top)
    return top + _sum_entries((values - top.repeat_interleave(counts, output_size=len(values))).exp(), counts).log()
