"""The options --again, --again-if-changed and --restart of a training command. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageRequest:
    """What to do with a finished result and an unfinished state."""

    again: Literal["never", "if_changed", "always"] = "never"  # whether to retrain a finished stage
    restart: bool = False  # whether to discard an unfinished state
