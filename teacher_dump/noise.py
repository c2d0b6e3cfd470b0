"""Teacher noise: how far two scorings of the same samples are apart, in different batches.

It is the floor below which no fidelity of a cache means anything. Legend: r rows, v vocabulary.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from storage.documents import LARGEST_ERROR
from teacher_dump.head import OutputHead

NUM_SAMPLES = 4  # of a part that measures, scored a second time
MAX_ROWS = 256  # of a family and part
_DIGITS = 8  # of nats: below float32's own resolution of a logprob, so that an exact teacher states 0


def rescored_kl(
    head: OutputHead, first: Float[Tensor, "r d"], second: Float[Tensor, "r d"], *, rows_per_chunk: int
) -> list[float]:
    """KL(first || second) of each of the first MAX_ROWS rows, over the whole vocabulary, nats to 8 digits."""
    found: list[float] = []
    for start in range(0, min(len(first), MAX_ROWS), rows_per_chunk):
        rows = slice(start, min(start + rows_per_chunk, MAX_ROWS))
        log_p, log_q = (head.logits(states[rows]).double().log_softmax(dim=1) for states in (first, second))
        terms = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0)  # a token of probability 0 in both
        found += [min(max(round(value, _DIGITS), 0.0), LARGEST_ERROR) for value in terms.sum(dim=1).tolist()]
    return found
