"""Functions that tests call with a loaded teacher, in another process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from teacher_dump.data.partition import Part
from teacher_dump.signals.scoring import PartScorer


def count_tokens(scorer: PartScorer, parts: Sequence[Part]) -> list[int]:
    assert scorer.teacher is not None
    logging.getLogger(__name__).info("counted %d parts", len(parts))
    return [scorer.score(part).num_tokens for part in parts]


def fail(scorer: PartScorer, reason: str) -> None:
    raise ZeroDivisionError(reason)
