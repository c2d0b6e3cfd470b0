"""Records which devices failed under the dump's actors: a device that always fails must end the dump."""

from __future__ import annotations

import os
import socket
from collections import Counter

LOSSES_IN_A_ROW = 3  # processes on one device that scored no part: more than a repeated accident


class DeviceRecord:
    """Counts, for each device, consecutive processes that lost it. The dump's gate keeps it, in one process.

    A device counts from its first call of `begin`. The dump is hopeless once every device has failed
    LOSSES_IN_A_ROW times; while one device works, it gets the parts that others lost.
    """

    def __init__(self) -> None:
        self._losses: Counter[str] = Counter()
        self._known: set[str] = set()

    def begin(self, device: str) -> None:
        """Notes that a device begins a part."""
        self._known.add(device)

    def note_part(self, device: str) -> None:
        """Notes that a device finished a part."""
        self._losses[device] = 0

    def note_loss(self, device: str, *, num_parts: int = 0) -> bool:
        """Notes that a process with `num_parts` parts lost its device; returns whether the dump is hopeless."""
        self._known.add(device)
        self._losses[device] = 0 if num_parts else self._losses[device] + 1
        return all(self._losses[known] >= LOSSES_IN_A_ROW for known in self._known)


def get_device_name() -> str:
    """Returns a name for the GPUs that this process may use, or for its machine if it has none."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{socket.gethostname()}, GPU {gpus}" if gpus else socket.gethostname()
