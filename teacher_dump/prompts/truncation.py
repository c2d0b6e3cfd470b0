"""Prompts that are longer than the teacher takes: refused, or cut by a rule with a name.

A cut falls at the end of an answer, or inside of one; never inside an image, and never leaves a question without
its answer. A prompt that is cut after an answer is the prompt of the shorter conversation: the next answer's prompt
begins with the same ids (see teacher_dump/prompts/preprocessor.py), and a stop token keeps what follows it apart.

Legend: t unexpanded tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_dump.config import TooLong


def kept_length(
    response_mask: NDArray[np.bool_], positions: NDArray[np.int64], *, max_length: int, rule: TooLong
) -> int | None:
    """How many of a prompt's t tokens stay, so that at most `max_length` positions do; None: it is refused.

    `positions` (t,): where each token lies once images are expanded. `cut_turns` leaves out whole questions with
    their answers, from the end; `cut_answer` keeps as much of the answer at `max_length` as fits, without its stop
    token, and does as `cut_turns` where a question is there. The prompt is known to be too long.
    """
    if rule == "refuse":
        return None
    fitting = int(np.searchsorted(positions, max_length))  # tokens before it start within the limit
    if rule == "cut_answer" and fitting and response_mask[fitting - 1 : fitting + 1].all():
        return fitting
    ends = np.flatnonzero(response_mask[:-1] & ~response_mask[1:]) + 1  # the last answer's own end is beyond the limit
    ends = ends[positions[ends] <= max_length]  # a token after the answer tells where the answer ends
    return int(ends[-1]) if len(ends) else None
