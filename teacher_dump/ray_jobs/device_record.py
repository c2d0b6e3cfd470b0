"""Which devices failed under the dump's actors: one that always fails must end the dump, not restart it for ever."""

from __future__ import annotations

import os
import socket
from collections import Counter

LOSSES_IN_A_ROW = 3  # processes of one device that did no part: an accident may repeat, this is none


class DeviceRecord:
    """Counts for each device how often in a row a process had to leave it. Kept by the dump's gate, in one process.

    A device takes part from its first call of `begin`. The dump is hopeless when every device that takes part has
    failed so often; as long as one works, parts that others lost find their way to it.
    """

    def __init__(self) -> None:
        self._losses: Counter[str] = Counter()
        self._known: set[str] = set()

    def begin(self, device: str) -> None:
        """A part is begun on a device."""
        self._known.add(device)

    def note_part(self, device: str) -> None:
        """A part came to its end on a device."""
        self._losses[device] = 0

    def note_loss(self, device: str, *, num_parts: int = 0) -> bool:
        """A process that did `num_parts` leaves a device that failed; whether there is no hope left."""
        self._known.add(device)
        self._losses[device] = 0 if num_parts else self._losses[device] + 1
        return all(self._losses[known] >= LOSSES_IN_A_ROW for known in self._known)


def this_device() -> str:
    """The GPUs that this process may use, or its machine where it has none."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{socket.gethostname()}, GPU {gpus}" if gpus else socket.gethostname()
