"""What a training command asks for besides training. Imports nothing heavy: the command line needs it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """How a finished result and an unfinished state are treated."""

    again: Literal["never", "if_changed", "always"] = "never"  # whether a finished stage is trained anew
    restart: bool = False  # an unfinished state is given up
