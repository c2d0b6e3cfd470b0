"""A port for a server that cannot choose one itself and say which."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nobody listens on, and from which no connection goes out: those are taken from 32768 on.

    It is not held, so somebody else may be quicker: a caller starts its server again, with another port, where this
    one was taken meanwhile.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
