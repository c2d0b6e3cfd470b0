"""Measures teacher noise: the difference between two scorings of the same samples in different batches.

It is the floor of a cache's fidelity. Measuring costs a part two more samples and a few dense rows in float64: 3 %
of the prefill of a part of 64 samples, less than 1 % for 256.
Legend: r rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from storage.layout.documents import LARGEST_ERROR
from teacher_dump.signals.lm_head import OutputHead
from teacher_dump.signals.loaded_teacher import LoadedTeacher
from teacher_dump.signals.states import SampleStates, select_response_states, select_visual_states

NUM_SAMPLES = 2  # of a part that measures, scored a second time
MAX_ROWS = 32  # of a family and part
_DIGITS = 8  # of nats: below float32's own resolution of a logprob, so that an exact teacher states 0


def measure_teacher_noise(
    teacher: LoadedTeacher, scored: Sequence[SampleStates], *, families: Collection[str]
) -> dict[str, list[float]]:
    """Scores samples again, in a batch of their own and in reverse order; returns row KLs by family.

    `scored`: with their states, (T, d) each, from the first scoring. Families without a row of these samples are left
    out.
    """
    first = scored[:NUM_SAMPLES]
    rescored = teacher.hidden_states([sample for sample, _ in reversed(first)]).accepted
    again = {sample.record.sample_id: own for sample, own in rescored}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {family: [] for family in families}
    for sample, own in first:
        other = again.get(sample.record.sample_id)
        if other is None or not bool(torch.isfinite(own + other).all()):
            continue
        if "response" in pairs:
            pairs["response"].append((select_response_states(sample, own), select_response_states(sample, other)))
        if "visual" in pairs:
            pairs["visual"] += zip(select_visual_states(sample, own), select_visual_states(sample, other), strict=True)
    return {
        family: compute_rescored_kl(teacher.head, torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows]))
        for family, rows in pairs.items()
        if rows
    }


def compute_rescored_kl(head: OutputHead, first: Float[Tensor, "r d"], second: Float[Tensor, "r d"]) -> list[float]:
    """Returns KL(first || second) of at most MAX_ROWS evenly spread rows, over the whole vocabulary, in nats."""
    count = min(len(first), MAX_ROWS)
    rows = torch.arange(count, device=first.device) * len(first) // max(count, 1)
    log_p, log_q = (head.logits(states[rows]).double().log_softmax(dim=1) for states in (first, second))
    terms = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0)  # a token of probability 0 in both
    return [min(max(round(value, _DIGITS), 0.0), LARGEST_ERROR) for value in terms.sum(dim=1).tolist()]
