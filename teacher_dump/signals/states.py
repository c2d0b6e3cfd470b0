"""Which of a sample's hidden states a family's rows are made of.

Legend: r response rows, n visual tokens of one image, d hidden, T positions of the expanded prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from teacher_dump.prompts.preparation import Prepared


def labels_of(sample: Prepared) -> Tensor:
    """(r,) the response tokens, int64."""
    return torch.from_numpy(sample.record.token_ids[sample.record.response_mask].astype(np.int64))


def response_states(sample: Prepared, states: Tensor) -> Tensor:
    """(r, d) the states that predict the response tokens, float32."""
    return states[torch.from_numpy(sample.response_positions)].float()


def visual_states(sample: Prepared, states: Tensor) -> list[Tensor]:
    """(n, d) for each image of a sample, unshifted: the states at its visual tokens themselves."""
    return [states[torch.from_numpy(positions)] for positions in sample.expansion.visual]


def new_images(kept: Sequence[tuple[Prepared, Tensor]], known: set[str]) -> dict[str, Tensor]:
    """Hidden states of the images whose key is not yet known, (n, d) each; their keys become known."""
    new: dict[str, Tensor] = {}
    for sample, states in kept:
        for ref, own in zip(sample.record.images, visual_states(sample, states), strict=True):
            if ref.key not in known:
                known.add(ref.key)
                new[ref.key] = own
    return new
