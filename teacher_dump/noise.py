"""Teacher noise: how far two scorings of the same samples are apart, in different batches.

It is the floor below which no fidelity of a cache means anything. A part that measures it pays for two samples more
and for few dense rows in float64: 3 % of the prefill of a part of 64 samples, a quarter of that of a part of 256.
Legend: r rows, v vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from storage.documents import LARGEST_ERROR
from teacher_dump.head import OutputHead

NUM_SAMPLES = 2  # of a part that measures, scored a second time
MAX_ROWS = 32  # of a family and part
_DIGITS = 8  # of nats: below float32's own resolution of a logprob, so that an exact teacher states 0


def rescored_kl(head: OutputHead, first: Float[Tensor, "r d"], second: Float[Tensor, "r d"]) -> list[float]:
    """KL(first || second) of MAX_ROWS rows, evenly spread over all, over the whole vocabulary, nats to 8 digits."""
    count = min(len(first), MAX_ROWS)
    rows = torch.arange(count, device=first.device) * len(first) // max(count, 1)
    log_p, log_q = (head.logits(states[rows]).double().log_softmax(dim=1) for states in (first, second))
    terms = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0)  # a token of probability 0 in both
    return [min(max(round(value, _DIGITS), 0.0), LARGEST_ERROR) for value in terms.sum(dim=1).tolist()]
