"""When a loss explodes, and what is written down of the batch then."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from storage.errors import StillhouseError

WINDOW = 50  # steps


class DivergedError(StillhouseError):
    """A loss or a gradient that is no number, or a loss that explodes."""

    def __init__(self, message: str, *, batch: Mapping[str, Any], everywhere: bool) -> None:
        """`batch`: what this rank computed. `everywhere`: all ranks see it and stop."""
        super().__init__(message)
        self.batch = batch
        self.everywhere = everywhere


class LossWatch:
    """Whether a step's loss is many times what it has been.

    It explodes if it is `factor` times the median size of the last 50 steps' losses, and above all losses of the
    run. The second condition spares losses that have come close to 0, where a hard batch is many times the median;
    the first 50 steps are never stopped.
    """

    def __init__(self, factor: float | None) -> None:
        """`factor` None: nothing explodes."""
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._highest = -float("inf")

    def limit(self) -> float | None:
        """The loss above which the next step explodes; None as long as there is none."""
        if self._factor is None or len(self._recent) < WINDOW:
            return None
        return max(self._highest, self._factor * statistics.median(map(abs, self._recent)))

    def add(self, loss: float) -> None:
        """The loss of a step that is kept."""
        self._recent.append(loss)
        self._highest = max(self._highest, loss)

    def state(self) -> dict[str, Any]:
        """For a document, from which `restore` goes on."""
        return {"recent": list(self._recent), "highest": self._highest if self._recent else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was called."""
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._highest = -float("inf") if state["highest"] is None else state["highest"]


def shortened(ids: Sequence[str]) -> str:
    """Sample ids for a message."""
    return ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
