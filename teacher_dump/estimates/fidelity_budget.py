"""The fidelity budget: chooses tau and rounding_kl that keep a gradient error or a size, on a slice of the plan.

Gradients are those of a proxy student: the teacher's own head over its hidden states with Gaussian noise, scaled to
a mean KL of 0.3 nats; a real student differs. The error of p^ is ||sum (p^ - p) h^T|| / ||sum (q - p) h^T||, sums over
rows, h the student's hidden states. Draws are unbiased, so their part of the numerator grows like the square root of
the number of rows and the denominator linearly: an error is stated for a number of rows.
Legend: r rows, v vocabulary, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.config import BudgetSection
from storage.encoding.distributions import RowFormat, encode_groups
from storage.encoding.id_groups import IdGroups
from storage.encoding.part_encoder import PartEncoder
from storage.encoding.row_block import decode_block, encode_block
from storage.errors import ConfigError
from storage.records.sparse_rows import SparseRows
from storage.selection import Threshold
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.sparsify import make_row_uniforms, select_rows

STUDENT_KL = 0.3  # nats, mean over rows
MAX_ROWS = 2048  # of a family, for the calibration
_TAUS = tuple(float(f"{0.1 * 2 ** (-step / 8):.3g}") for step in range(61))  # 0.1 to 0.00055, 8 an octave
_ROUNDINGS = (2e-3, 5e-4, 1.25e-4)  # nats a row
_COLUMNS = 8192  # of [r, v] at once
_ROWS = 256  # likewise


@dataclass(frozen=True)
class BudgetChoice:
    """A setting of threshold selection, with its predicted error and size."""

    tau: float
    rounding_kl: float
    gradient_error: float  # summed over `rows` rows, of the proxy student
    bytes_per_row: float  # of the family's file of one part
    distance: float  # mean ||p^ - p||_2 of a row: compare with selection_errors
    rows: int  # that gradient_error is stated for
    calibration_rows: int


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Teacher rows of whole samples (or images), one after another."""

    head: OutputHead
    hidden: Tensor  # (r, d) float32
    sizes: tuple[int, ...]  # rows of each sample
    family: str
    encoder: PartEncoder  # of the dump, but for tau and rounding_kl
    rows_per_part: int  # expected in a part of the dump

    @property
    def row_format(self) -> RowFormat:
        """How the dump's encoder keeps such rows, but without further temperatures."""
        return replace(RowFormat.of(self.encoder.identity, self.family), num_temperatures=0)


def choose_setting(rows: TeacherRows, budget: BudgetSection) -> BudgetChoice:
    """Returns the cheapest setting within a gradient error, or the most faithful within bytes a row.

    Deterministic. Raises ConfigError if no setting is within the budget, with the nearest numbers.
    """
    trial = _BudgetTrial(rows, budget.rows)
    limit = budget.gradient_error if budget.gradient_error is not None else budget.bytes_per_row
    assert limit is not None

    def get_spent(choice: BudgetChoice) -> float:
        return choice.gradient_error if budget.gradient_error is not None else choice.bytes_per_row

    def get_cost(choice: BudgetChoice) -> float:
        return choice.bytes_per_row if budget.gradient_error is not None else choice.gradient_error

    # With smaller tau errors fall and bytes rise, so a binary search finds the last setting that fits.
    fitting_first = _TAUS if budget.bytes_per_row is not None else _TAUS[::-1]
    tried = [
        _find_last_within(fitting_first, lambda tau, kl=kl: trial.evaluate(tau, kl), get_spent, limit)
        for kl in _ROUNDINGS
    ]
    fitting = [choice for choice in tried if get_spent(choice) <= limit]
    if fitting:
        return min(fitting, key=lambda choice: (get_cost(choice), choice.rounding_kl))
    nearest = min(tried, key=get_spent)
    asked = "gradient_error" if budget.gradient_error is not None else "bytes_per_row"
    raise ConfigError(
        f"cache.budget.{asked}: {limit:g} cannot be met for {rows.family} rows; the nearest is tau {nearest.tau:g} and "
        f"rounding_kl {nearest.rounding_kl:g}: gradient error {nearest.gradient_error:.3g} over {nearest.rows:,} rows "
        f"at {nearest.bytes_per_row:.3g} bytes a row ({nearest.calibration_rows:,} rows were tried)"
    )


def _find_last_within(
    taus: Sequence[float],
    make: Callable[[float], BudgetChoice],
    get_spent: Callable[[BudgetChoice], float],
    limit: float,
) -> BudgetChoice:
    """Returns the choice of the last tau within the limit; of the first tau if none is."""
    low, high = 0, len(taus)  # the first fits, or nothing does; from `high` on nothing fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if get_spent(make(taus[middle])) <= limit else (low, middle)
    return make(taus[low])


class _BudgetTrial:
    """Dense rows of a teacher and its proxy student; evaluates settings on them."""

    def __init__(self, rows: TeacherRows, num_rows: int) -> None:
        self._rows = rows
        self._num_rows = num_rows
        self._student = _make_student_states(rows.head, rows.hidden)
        self._sample = torch.from_numpy(np.repeat(np.arange(len(rows.sizes)), rows.sizes)).to(self._student.device)
        self.evaluate = lru_cache(maxsize=None)(self._evaluate)
        self._selected = lru_cache(maxsize=4)(self._select)

    def _evaluate(self, tau: float, rounding_kl: float) -> BudgetChoice:
        selected, variance = self._selected(tau)
        drawn = float((variance * self._student.double().square().sum(dim=1).cpu().numpy()).mean()) * self._num_rows
        rounded = self._extrapolate_norm(self._rounding_chunks(selected, tau, rounding_kl))
        return BudgetChoice(
            tau=tau,
            rounding_kl=rounding_kl,
            gradient_error=float(f"{np.sqrt((drawn + rounded) / max(self._gradient_norm, 1e-300)):.3g}"),
            bytes_per_row=float(f"{self._bytes_per_row(selected, tau, rounding_kl):.3g}"),
            distance=float(f"{_list_distances(selected).mean():.3g}"),
            rows=self._num_rows,
            calibration_rows=len(self._rows.hidden),
        )

    @cached_property
    def _gradient_norm(self) -> float:
        """The squared norm of sum (q - p) h^T over the number of rows that an error is stated for."""
        head, hidden = self._rows.head, self._rows.hidden
        totals = [_compute_log_totals(head, states) for states in (hidden, self._student)]

        def chunks() -> Iterator[Tensor]:
            for start in range(0, head.vocab_size, _COLUMNS):
                part = _slice_head(head, slice(start, start + _COLUMNS))
                p, q = (
                    (part.logits(states) - total[:, None]).exp()
                    for states, total in zip((hidden, self._student), totals, strict=True)
                )
                yield q - p

        return self._extrapolate_norm(chunks())

    def _extrapolate_norm(self, chunks: Iterator[Tensor]) -> float:
        """Extrapolates the squared norm of sum e h^T to the stated number of rows, from columns of e, (r, c) each.

        Samples are independent: with G_i the sum over sample i, and n samples in the stated rows, it is
        n * mean |G_i|^2 + n (n - 1) * mean <G_i, G_j>.
        """
        count, states = len(self._student), self._student
        products = torch.zeros(count, count, dtype=torch.float64, device=states.device)
        for chunk in chunks:
            products += (chunk @ chunk.T).double()
        products *= (states @ states.T).double()
        num_samples = int(self._sample.max()) + 1 if count else 0
        sums = torch.zeros(num_samples, count, dtype=torch.float64, device=states.device)
        sums.index_add_(0, self._sample, products)
        within = float(sums.T[torch.arange(count, device=states.device), self._sample].sum())
        across = float(sums.sum()) - within
        n = num_samples * self._num_rows / max(count, 1)
        mean_across = across / (num_samples * (num_samples - 1)) if num_samples > 1 else 0.0
        return n * within / max(num_samples, 1) + max(n * (n - 1), 0.0) * max(mean_across, 0.0)

    def _select(self, tau: float) -> tuple[SparseRows, NDArray[np.float64]]:
        """Returns the rows as stored, and each row's expected squared distance: sum of p (tau - p) for p < tau."""
        rows, kept = self._rows, self._rows.row_format
        uniforms = make_row_uniforms(
            len(rows.hidden), seed=kept.seed, family=rows.family, key="calibration", num_sets=kept.num_sets
        )
        parts, variance = [], []
        for start in range(0, len(rows.hidden), _ROWS):
            chunk = slice(start, start + _ROWS)
            logits = rows.head.logits(rows.hidden[chunk])
            p = logits.softmax(dim=1)
            p = torch.where(p < tau, p, 0)
            variance.append((p * (tau - p)).sum(dim=1).double().cpu().numpy())
            labels = logits.argmax(dim=1) if rows.family == "response" else None
            parts.append(select_rows(logits, labels=labels, selection=Threshold(tau), uniforms=uniforms[chunk]))
        return SparseRows.concatenate(parts), np.concatenate(variance)

    def _rounding_chunks(self, selected: SparseRows, tau: float, rounding_kl: float) -> Iterator[Tensor]:
        """Yields decoded minus selected probabilities of the exact entries, by ascending id."""
        groups = IdGroups.of_counts(_count_ids(selected, self._rows.head.vocab_size))
        one_set = replace(selected, other_sets=())
        block = encode_block(one_set, groups, tau=tau, rounding_kl=rounding_kl).block
        got = decode_block(
            block,
            groups,
            tail_mass=selected.tail_mass,
            entropy=selected.entropy,
            log_sum_exp=selected.log_sum_exp,
            label_logprob=selected.label_logprob,
        )
        rows, ids, before = _list_exact_entries(selected)
        _, _, after = _list_exact_entries(got)
        used, column = np.unique(ids, return_inverse=True)
        for start in range(0, len(used), _COLUMNS):
            here = (column >= start) & (column < start + _COLUMNS)
            chunk = np.zeros((selected.num_rows, min(_COLUMNS, len(used) - start)), np.float32)
            chunk[rows[here], column[here] - start] = (after - before)[here]
            yield torch.from_numpy(chunk).to(self._student.device)

    def _bytes_per_row(self, selected: SparseRows, tau: float, rounding_kl: float) -> float:
        """Predicts bytes a row in a part's file: encodes two sizes to separate the fixed cost of a file."""
        rows = self._rows
        kept = replace(rows.row_format, tau=tau, rounding_kl=rounding_kl)
        stops = np.cumsum(rows.sizes).tolist()
        samples = [selected.slice(stop - size, stop) for stop, size in zip(stops, rows.sizes, strict=True)]
        whole, half = (_measure_file_bytes(some, kept, rows) for some in (samples, samples[::2]))
        num_rows, num_half = selected.num_rows, sum(each.num_rows for each in samples[::2])
        if num_rows == num_half:
            return whole / max(num_rows, 1)
        each = (whole - half) / (num_rows - num_half)
        return (whole + each * (rows.rows_per_part - num_rows)) / rows.rows_per_part


def _measure_file_bytes(samples: Sequence[SparseRows], kept: RowFormat, rows: TeacherRows) -> int:
    name, digits = ("sample_id", 12) if rows.family == "response" else ("image_key", 64)
    keys = [{name: f"{number:0{digits}x}"} for number in range(len(samples))]
    return len(rows.encoder.to_parquet(rows.family, encode_groups(keys, samples, kept)))


def _make_student_states(head: OutputHead, hidden: Tensor) -> Tensor:
    """Returns the proxy student's states: the teacher's with noise, scaled to a mean KL of STUDENT_KL."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device) * hidden.std()
    probe = torch.linspace(0, len(hidden) - 1, min(len(hidden), _ROWS)).long()
    log_p = head.logits(hidden[probe]).log_softmax(dim=1)
    low, high = 0.0, 64.0
    for _ in range(24):
        middle = (low + high) / 2
        log_q = head.logits(hidden[probe] + middle * noise[probe]).log_softmax(dim=1)
        divergence = float((log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0).sum(dim=1).mean())
        low, high = (middle, high) if divergence < STUDENT_KL else (low, middle)
    return hidden + high * noise


def _slice_head(head: OutputHead, columns: slice) -> OutputHead:
    """Returns the head restricted to some tokens."""
    return replace(head, weight=head.weight[columns], bias=None if head.bias is None else head.bias[columns])


def _compute_log_totals(head: OutputHead, hidden: Tensor) -> Tensor:
    return torch.cat([head.logits(part).logsumexp(dim=1) for part in hidden.split(_ROWS)])


def _count_ids(rows: SparseRows, vocab_size: int) -> NDArray[np.int64]:
    return np.bincount(rows.ids, minlength=vocab_size).astype(np.int64)


def _list_exact_entries(rows: SparseRows) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Returns row, id and probability of the exact entries, sorted by row and id."""
    exact = rows.is_exact()
    row, ids, p = rows.row_of_entry()[exact], rows.ids[exact], np.exp(rows.logprobs[exact])
    order = np.lexsort((ids, row))
    return row[order], ids[order], p[order]


def _list_distances(rows: SparseRows) -> NDArray[np.float32]:
    sets = [each.selection_error for each in (rows, *rows.other_sets)]
    return np.concatenate([each for each in sets if each is not None])
