"""Measures how far a model is from the references and from the cached teacher, sample by sample, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student_train.data.collate import Batch
from student_train.losses.load_balancing import RouterLosses, router_losses
from student_train.losses.sparse_divergence import measure_rows_
from student_train.models.sparse_upcycling import is_sparse
from student_train.models.student import Student

CHUNK_LOGITS = 1 << 25  # logits in memory at once


@dataclass(frozen=True)
class SampleFidelity:
    """Sums of distances over the response rows of one sample, all its answers together."""

    sample_id: str
    num_labels: int  # tokens of the references
    cross_entropy_sum: float  # nats, of the references' tokens
    num_rows: int  # with a distribution of the teacher
    kl_sum: float  # nats, exact entries and one bucket; 0 without rows

    def convert(self) -> dict[str, Any]:
        """Return the sums in JSON types; those of the teacher are left out where the cache has no rows of it."""
        document = {
            "sample_id": self.sample_id,
            "num_labels": self.num_labels,
            "cross_entropy_sum": self.cross_entropy_sum,
        }
        return document | ({"num_rows": self.num_rows, "kl_sum": self.kl_sum} if self.num_rows else {})


@dataclass(frozen=True)
class Fidelity:
    """Distances from the references and from the cached teacher, over held-out response rows."""

    samples: tuple[SampleFidelity, ...]
    num_agreeing: int  # rows whose most probable token is the teacher's
    num_topped: int  # rows whose most probable token of the teacher is stored
    routers: tuple[tuple[int, RouterLosses], ...] = ()  # of a sparse model: (number of tokens, losses) of each batch

    @staticmethod
    def combine(parts: Sequence[Fidelity]) -> Fidelity:
        """Put several batches together."""
        return Fidelity(
            samples=tuple(sample for part in parts for sample in part.samples),
            num_agreeing=sum(part.num_agreeing for part in parts),
            num_topped=sum(part.num_topped for part in parts),
            routers=tuple(router for part in parts for router in part.routers),
        )

    @property
    def cross_entropy(self) -> float | None:
        """Mean over the references' tokens; None without any."""
        return compute_means(self.samples)["cross_entropy"]

    @property
    def kl(self) -> float | None:
        """Mean over rows; None without any."""
        return compute_means(self.samples)["kl_to_teacher"]

    @property
    def agreement(self) -> float | None:
        """Fraction of rows whose most probable token is the teacher's; None without any."""
        return self.num_agreeing / self.num_topped if self.num_topped else None


def compute_means(samples: Iterable[SampleFidelity]) -> dict[str, float | None]:
    """Return the mean cross-entropy of the samples' tokens and the mean KL of their rows, as an evaluation has them."""
    samples = list(samples)
    num_labels, num_rows = sum(each.num_labels for each in samples), sum(each.num_rows for each in samples)
    cross_entropy = math.fsum(each.cross_entropy_sum for each in samples)
    kl = math.fsum(each.kl_sum for each in samples)
    return {
        "cross_entropy": cross_entropy / num_labels if num_labels else None,
        "kl_to_teacher": kl / num_rows if num_rows else None,
    }


def measure_fidelity(student: Student, batch: Batch) -> Fidelity:
    """Measure the samples of a batch. With rows of the teacher in it, also KL and agreement with its first choice."""
    inputs = batch.input_ids, batch.visual_positions, batch.vision
    routers = ()
    if is_sparse(student.model.config):
        hidden, logits = student.compute_hidden_and_routers(*inputs)
        is_token = batch.is_token.flatten()
        routers = ((int(is_token.sum()), router_losses(logits, is_token, top_k=student.top_k)),)
    else:
        hidden = student.compute_hidden(*inputs)
    rows = hidden.index_select(0, batch.response_positions)
    per_chunk = max(1, CHUNK_LOGITS // student.vocab_size)
    surprises, divergences, num_agreeing, num_topped = [], [], 0, 0
    for start in range(0, len(rows), per_chunk):
        stop = min(start + per_chunk, len(rows))
        logits, labels = student.compute_logits(rows[start:stop]).float(), batch.labels[start:stop]
        if batch.response is None:
            surprises.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
            continue
        teacher = batch.response[start:stop]
        topped = teacher.num_exact > 0  # entries descend, so the first is the most probable
        tops = teacher.ids[teacher.offsets[:-1][topped]]
        num_agreeing += int((logits.argmax(1)[topped] == tops).sum())
        num_topped += int(topped.sum())
        surprise, divergence = measure_rows_(logits, labels, teacher)
        surprises.append(surprise)
        divergences.append(divergence)
    counts = batch.response_counts.tolist()
    num_rows = counts if batch.response is not None else [0] * len(counts)
    sums = zip(
        batch.sample_ids, counts, _sum_by_sample(surprises, batch), num_rows, _sum_by_sample(divergences, batch),
        strict=True,
    )  # fmt: skip
    return Fidelity(tuple(SampleFidelity(*each) for each in sums), num_agreeing, num_topped, routers)


def _sum_by_sample(chunks: Sequence[Tensor], batch: Batch) -> list[float]:
    """Sum the rows of each sample in float64; zeros without rows. Rows lie sample by sample."""
    sums = torch.zeros(len(batch.sample_ids), dtype=torch.float64, device=batch.response_counts.device)
    if chunks:
        sample = torch.arange(len(sums), device=sums.device).repeat_interleave(batch.response_counts)
        sums.index_add_(0, sample, torch.cat(list(chunks)).double())
    return sums.tolist()
