"""Signals' handlers beside libraries that replace them."""

from __future__ import annotations

import subprocess
import sys

REPLACED = """
import ctypes, os, signal, sys, time
from storage.processes.stop_signals import keep_handler
libc, heard = ctypes.CDLL(None), []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))

def handler_bytes():
    action = ctypes.create_string_buffer(256)
    libc.sigaction(signal.SIGTERM, None, action)
    return action.raw[:8]  # the function; most of the rest is not written

python_s = handler_bytes()
with keep_handler(signal.SIGTERM):
    for _ in range(3):
        libc.signal(signal.SIGTERM, 0)  # the kernel's default action: the process would die
        while handler_bytes() != python_s:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
    libc.signal(signal.SIGTERM, 0)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(len(heard))
"""


def test_a_handler_that_c_code_replaces_is_in_force_again() -> None:
    done = subprocess.run([sys.executable, "-c", REPLACED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (4, "")


LOST = """
import os, signal, sys
from storage.processes.stop_signals import Interrupted, interruptible, keep_handler

def lose(number, frame):
    try:
        raise SystemExit(1)
    except SystemExit:
        pass  # as an exception in a callback gets lost

try:
    with interruptible():
        with keep_handler(signal.SIGTERM):
            MOMENT
            signal.signal(signal.SIGTERM, lose)
            os.kill(os.getpid(), signal.SIGTERM)
        sys.exit("the signal was lost")
except Interrupted as stop:
    sys.exit(stop.number)
"""


def test_a_signal_that_another_handler_lost_is_heard_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST.replace("MOMENT", "")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (15, "")


def test_a_signal_that_was_handled_is_not_handled_again() -> None:
    code = REPLACED.replace("    for _ in range(3):", "    for _ in range(1):").replace(
        "    libc.signal(signal.SIGTERM, 0)\nos.kill(os.getpid(), signal.SIGTERM)\n", ""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_without_a_handler_nothing_is_kept() -> None:
    code = REPLACED.replace("signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))", "pass")
    code = code.replace("    for _ in range(3):", "    for _ in range(0):")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -15
