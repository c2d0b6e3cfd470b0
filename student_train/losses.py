"""The losses, as sums over rows: tensors in, a scalar out.

Legend: r rows, v vocabulary, e stored entries of all rows together, i images, n visual tokens of an image,
m blocks of its pooled grid, d hidden.
All are computed in float32 whatever the input's dtype. A sum over no rows is 0 and stays attached to the
graph. Dividing by the number of rows of the whole global batch is left to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from storage.relation import blocks_of_grid


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Cached teacher distributions in CSR form; see storage.rows.SparseRows for the meaning of the fields."""

    offsets: Int[Tensor, " o"]  # o = r + 1
    ids: Int[Tensor, " e"]
    logprobs: Float[Tensor, " e"]  # exact entries: log p, falling; then sampled entries: log of their weight
    num_exact: Int[Tensor, " r"]
    tail_mass: Float[Tensor, " r"]
    entropy: Float[Tensor, " r"]  # nats, of the full distribution

    @property
    def num_rows(self) -> int:
        return self.num_exact.shape[0]

    def slice(self, start: int, stop: int) -> TeacherRows:
        """Rows start : stop."""
        first, last = (int(self.offsets[row]) for row in (start, stop))
        return TeacherRows(
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            logprobs=self.logprobs[first:last],
            num_exact=self.num_exact[start:stop],
            tail_mass=self.tail_mass[start:stop],
            entropy=self.entropy[start:stop],
        )

    def row_of_entry(self) -> Int[Tensor, " e"]:
        """The row that each entry belongs to."""
        rows = torch.arange(self.num_rows, device=self.ids.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.ids.shape[0])

    def to(self, device: torch.device) -> TeacherRows:
        """The same rows on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return TeacherRows(**moved)


def cross_entropy(logits: Float[Tensor, "r v"], labels: Int[Tensor, " r"]) -> Float[Tensor, ""]:
    """Sum over rows of -log q(label), in nats.

    Source: LLaVA-KD (arXiv 2410.16236), L_reg.
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def bucketed_forward_kl(logits: Float[Tensor, "r v"], teacher: TeacherRows) -> Float[Tensor, ""]:
    """Sum over rows of KL(teacher || student) in nats, every token without an exact entry in one bucket.

    KL_S = sum_S p (log p - log q) + p_rest (log p_rest - log q_rest). Merging can only lower the divergence:
    a lower bound of the dense KL, equal to it when the exact entries are the whole vocabulary.
    Sampled entries are not used: their mass is part of the stored tail.
    """
    logits = logits.float()
    num_rows, vocab_size = logits.shape
    log_z = logits.logsumexp(1)  # (r,)
    row = teacher.row_of_entry()
    exact = torch.arange(row.shape[0], device=row.device) - teacher.offsets[row] < teacher.num_exact[row]
    row, ids, log_p = row[exact], teacher.ids[exact], teacher.logprobs[exact].float()
    log_q = logits[row, ids] - log_z[row]
    head = (log_p.exp() * (log_p - log_q)).sum()
    # The student's rest is summed over the tokens outside the head: 1 - sum(q) would cancel to 0 near 1.
    in_head = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=logits.device)
    in_head[row, ids] = True
    p_rest = teacher.tail_mass.float()
    has_rest = (p_rest > 0) & (teacher.num_exact < vocab_size)
    rest = logits[has_rest].masked_fill(in_head[has_rest], -torch.inf).logsumexp(1) - log_z[has_rest]
    p_rest = p_rest[has_rest]
    return head + (p_rest * (p_rest.log() - rest)).sum() + 0 * log_z.sum()


def unbiased_forward_kl(logits: Float[Tensor, "r v"], teacher: TeacherRows) -> Float[Tensor, ""]:
    """Sum over rows of an unbiased estimate of KL(teacher || student), in nats.

    sum w (-log q) - H(p): exact entries weigh w = p, sampled ones their stored weight, whose expectation
    is p, and H(p) is the teacher's full entropy, stored. A single row's estimate may be negative; the mean
    over draws is the dense KL, and so is its gradient. Needs rows whose tail was sampled.
    """
    logits = logits.float()
    log_z = logits.logsumexp(1)
    row = teacher.row_of_entry()
    log_q = logits[row, teacher.ids] - log_z[row]
    return -(teacher.logprobs.float().exp() * log_q).sum() - teacher.entropy.float().sum() + 0 * log_z.sum()


def relation_loss(
    hidden: Float[Tensor, "i n d"],
    metric: Float[Tensor, "d d"],
    teacher: Float[Tensor, "i m m"],
    *,
    centered: bool = False,
    pool: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over images of 1 - cosine between the teacher's and the student's relation matrix.

    The student's is G = H (W^T W) H^T = Z Z^T with `metric` W^T W and Z the raw logits of the visual rows,
    which are never formed. The cosine does not feel the scale of either matrix. With `centered` the mean
    visual row is subtracted first, and with `pool` rows are then averaged over blocks of the grid (m blocks,
    else m is n), as the cache says of the teacher's.

    Source: LLaVA-KD (arXiv 2410.16236), RDist; its code flattens a whole batch into one cosine.
    """
    hidden, metric, teacher = hidden.float(), metric.float(), teacher.float()
    if hidden.shape[0] == 0:
        return 0 * (hidden.sum() + metric.sum())
    if centered:
        hidden = hidden - hidden.mean(1, keepdim=True)
    if pool is not None:
        hidden = _block_means(hidden, pool)  # (i, m, d)
    student = hidden @ metric @ hidden.mT  # (i, m, m)
    return (1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1)).sum()


def _block_means(hidden: Float[Tensor, "i n d"], pool: int) -> Float[Tensor, "i m d"]:
    """Rows averaged over pool x pool blocks of each image's square grid; see storage.relation.blocks_of_grid."""
    block = torch.from_numpy(blocks_of_grid(hidden.shape[1], pool)).to(hidden.device)
    counts = torch.bincount(block).to(hidden.dtype)
    sums = hidden.new_zeros(hidden.shape[0], len(counts), hidden.shape[2]).index_add(1, block, hidden)
    return sums / counts[:, None]
