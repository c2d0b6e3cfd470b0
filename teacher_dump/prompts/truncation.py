"""Truncates prompts that are longer than the teacher's limit, by a named rule, or refuses them.

A cut lies at the end of an answer, or inside of one; never inside an image, and never leaves a question without
its answer. A prompt cut after an answer equals the prompt of the shorter conversation: the next generation prompt
begins with the same ids (see teacher_dump/prompts/preprocessor.py), and tokenizers do not join text across a stop
token.

Legend: t unexpanded tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_dump.config import TooLong


def compute_kept_length(
    response_mask: NDArray[np.bool_], positions: NDArray[np.int64], *, max_length: int, rule: TooLong
) -> int | None:
    """Returns how many of a prompt's t tokens to keep for at most `max_length` positions; None: refuse it.

    `positions` (t,): of each token after images are expanded. `cut_turns` drops whole questions with their answers,
    from the end; `cut_answer` keeps the fitting part of the answer at `max_length`, without its stop token, and acts
    as `cut_turns` if a question is there. The caller knows that the prompt is too long.
    """
    if rule == "refuse":
        return None
    fitting = int(np.searchsorted(positions, max_length))  # tokens before it start within the limit
    if rule == "cut_answer" and fitting and response_mask[fitting - 1 : fitting + 1].all():
        return fitting
    ends = np.flatnonzero(response_mask[:-1] & ~response_mask[1:]) + 1  # the last answer's own end is beyond the limit
    ends = ends[positions[ends] <= max_length]  # a token after the answer tells where the answer ends
    return int(ends[-1]) if len(ends) else None
