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


def test_without_a_handler_nothing_is_kept() -> None:
    code = REPLACED.replace("signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))", "pass")
    code = code.replace("    for _ in range(3):", "    for _ in range(0):")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -15
