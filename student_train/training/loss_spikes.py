"""Detects loss spikes, and describes the batch that caused one."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from storage.errors import StillhouseError

WINDOW = 50  # steps


class DivergedError(StillhouseError):
    """A loss or gradient that is not finite, or a loss that explodes."""

    def __init__(self, message: str, *, batch: Mapping[str, Any], everywhere: bool) -> None:
        """`batch`: what this rank computed. `everywhere`: whether all ranks raise this error."""
        super().__init__(message)
        self.batch = batch
        self.everywhere = everywhere


class LossSpikeDetector:
    """Decides whether a step's loss explodes.

    A loss explodes if it exceeds `factor` times the median magnitude of the last 50 losses, and all losses of the
    run. The second condition spares losses close to 0, where a hard batch is many times the median. The first 50
    steps never explode.
    """

    def __init__(self, factor: float | None) -> None:
        """`factor`: None disables the detector."""
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._highest = -float("inf")

    def compute_limit(self) -> float | None:
        """Return the loss above which the next step explodes; None if there is no limit yet."""
        if self._factor is None or len(self._recent) < WINDOW:
            return None
        return max(self._highest, self._factor * statistics.median(map(abs, self._recent)))

    def add(self, loss: float) -> None:
        """Add the loss of a step that did not explode."""
        self._recent.append(loss)
        self._highest = max(self._highest, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values for `load_state_dict`."""
        return {"recent": list(self._recent), "highest": self._highest if self._recent else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._highest = -float("inf") if state["highest"] is None else state["highest"]


def shorten_ids(ids: Sequence[str]) -> str:
    """Join at most 32 sample ids for a message."""
    return ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
