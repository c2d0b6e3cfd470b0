"""Selects the hidden states of a sample that a family's rows need.

Legend: r response rows, n visual tokens of one image, d hidden, T positions of the expanded prompt.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor

from teacher_dump.prompts.preparation import PreparedSample

SampleStates = tuple[PreparedSample, Tensor]  # a sample and its hidden states, (T, d)


def get_labels(sample: PreparedSample) -> Tensor:
    """Returns the response tokens, (r,) int64."""
    return torch.from_numpy(sample.record.token_ids[sample.record.response_mask].astype(np.int64))


def select_response_states(sample: PreparedSample, states: Tensor) -> Tensor:
    """Returns the states that predict the response tokens, (r, d) float32."""
    return states[torch.from_numpy(sample.response_positions)].float()


def select_visual_states(sample: PreparedSample, states: Tensor) -> list[Tensor]:
    """Returns the states at each image's visual tokens, (n, d) each, not shifted."""
    return [states[torch.from_numpy(positions)] for positions in sample.expansion.visual]


def select_new_images(samples: Sequence[SampleStates], known: Container[str]) -> dict[str, Tensor]:
    """Returns hidden states, (n, d) each, of images whose key is not in `known`, by key."""
    new: dict[str, Tensor] = {}
    for sample, states in samples:
        for ref, own in zip(sample.record.images, select_visual_states(sample, states), strict=True):
            if ref.key not in known:
                new.setdefault(ref.key, own)
    return new
