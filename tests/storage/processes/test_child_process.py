"""Commands under a supervisor: whatever they start ends with them, with us, or at our word."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from storage.processes.child_process import run_child
from tests.processes import MarkedCommand, start_marked

ROOT = Path(__file__).parents[3]
STUBBORN = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep(600)
"""
# A child that ignores signals, in a session of its own as torchrun's ranks are, and another that has lost its parent.
NEST = f"""
import os, signal, subprocess, sys, time
start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
subprocess.run([sys.executable, "-c", start, {STUBBORN!r}])
time.sleep(0.5)
open(sys.argv[1], "w").close()
"""
WAITS = NEST + "time.sleep(600)\n"
SAVES = (
    NEST
    + """
def save(number, frame):
    time.sleep(1)
    open(sys.argv[1] + ".saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
while True:
    time.sleep(600)
"""
)
IGNORES = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS
# A program of ours: runs a command and says how it ended.
PARENT = """
import math, sys
from storage.processes.child_process import run_child
from storage.processes.stop_signals import get_exit_code, interruptible, exit_now
try:
    with interruptible(adopt=True):
        print("ended with", run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], grace_s=float(sys.argv[3])))
except KeyboardInterrupt as stop:
    exit_now(get_exit_code(stop))
"""


def start(tmp_path: Path, script: str, grace_s: float = 2.0, parent: str = PARENT) -> MarkedCommand:
    """A parent whose command has begun and has grandchildren."""
    flag = tmp_path / "begun"
    command = [sys.executable, "-c", parent, script, str(flag), str(grace_s)]
    running = start_marked(command, tmp_path / "log", cwd=ROOT)
    deadline = time.monotonic() + 60
    while not flag.exists():
        assert running.process.poll() is None, running.text()
        assert time.monotonic() < deadline, running.text()
        time.sleep(0.02)
    return running


def test_a_command_s_exit_code_is_passed_on(tmp_path: Path) -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -9
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]) == -15
    with (tmp_path / "log").open("wb") as log:
        assert run_child(["/no/such/program"], output=log) == 127
    assert "/no/such/program cannot be started" in (tmp_path / "log").read_text()


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    running = start(tmp_path, NEST)
    try:
        assert running.wait(60) == 0
        assert running.processes() == {}
        assert "ended with 0" in running.text()
    finally:
        running.kill()


@pytest.mark.parametrize("script", [WAITS, SAVES, IGNORES], ids=["waits", "saves", "ignores"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_ends_everything_below(tmp_path: Path, script: str, number: signal.Signals) -> None:
    running = start(tmp_path, script, grace_s=math.inf if script is SAVES else 2.0)
    try:
        running.process.send_signal(number)
        assert running.wait(60) == 128 + number, running.text()
        assert running.processes() == {}
        assert (tmp_path / "begun.saved").exists() == (script is SAVES)
    finally:
        running.kill()


def test_ctrl_c_in_a_terminal_and_a_signal_sent_twice_are_one(tmp_path: Path) -> None:
    running = start(tmp_path, SAVES, grace_s=math.inf)
    try:
        for _ in range(2):
            os.killpg(running.process.pid, signal.SIGINT)
            time.sleep(0.05)
        assert running.wait(60) == 130, running.text()
        assert (tmp_path / "begun.saved").exists()
        assert running.processes() == {}
    finally:
        running.kill()


def test_a_second_signal_ends_what_would_not(tmp_path: Path) -> None:
    running = start(tmp_path, IGNORES, grace_s=math.inf)
    try:
        running.process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60) == 130, running.text()
        assert running.processes() == {}
    finally:
        running.kill()


@pytest.mark.parametrize("script", [WAITS, SAVES, IGNORES], ids=["waits", "saves", "ignores"])
def test_a_killed_parent_leaves_nothing(tmp_path: Path, script: str) -> None:
    running = start(tmp_path, script, grace_s=math.inf)
    try:
        running.process.kill()
        assert running.wait_until_gone(60) == {}
        assert (tmp_path / "begun.saved").exists() == (script is SAVES)
    finally:
        running.kill()


def test_what_nobody_supervises_ends_with_a_watched_parent(tmp_path: Path) -> None:
    """As Ray's agents, whose own parent is killed with ours."""
    parent = (
        "import subprocess, sys, time\n"
        "from storage.processes.child_process import end_descendants_on_exit\n"
        "from storage.processes.supervisor import adopt_orphans\n"
        "adopt_orphans()\n"
        "with end_descendants_on_exit():\n"
        "    subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
    )
    running = start(tmp_path, IGNORES, parent=parent)
    try:
        time.sleep(1)  # the watcher looks five times a second
        running.process.kill()
        assert running.wait_until_gone(60) == {}
    finally:
        running.kill()


def test_a_parent_that_is_killed_while_its_watcher_looks_leaves_nothing(tmp_path: Path) -> None:
    """What was below it is below another process by then, or even before its own end, and is not found there."""
    watcher = (
        "import os, signal, sys, time\n"
        "from storage.processes.supervisor import list_descendants, watch\n"
        "parent, looks = os.getppid(), []\n"
        "def kill_and_look(pid):\n"
        "    looks.append(pid)\n"
        "    if len(looks) == 2:\n"
        "        return []\n"
        "    if len(looks) == 3:\n"
        "        os.kill(parent, signal.SIGKILL)\n"
        "    while len(looks) == 3 and os.getppid() == parent:\n"
        "        time.sleep(0.01)\n"
        "    return list_descendants(pid)\n"
        "while not os.path.exists(sys.argv[1]):\n"
        "    time.sleep(0.01)\n"
        "watch(parent, last_s=0.5, list_below=kill_and_look)\n"
    )
    parent = (
        "import subprocess, sys\n"
        "from storage.processes.supervisor import adopt_orphans\n"
        "adopt_orphans()\n"
        f"subprocess.Popen([sys.executable, '-c', {watcher!r}, sys.argv[2]])\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
    )
    running = start(tmp_path, IGNORES, parent=parent)
    try:
        assert running.wait_until_gone(60) == {}, running.text()
    finally:
        running.kill()


def test_what_a_process_starts_after_its_parent_s_death_ends_too(tmp_path: Path) -> None:
    """As a worker that Ray starts before it has noticed."""
    late = (
        "import os, subprocess, sys, time\n"
        "parent = os.getppid()\n"
        "open(sys.argv[2], 'w').close()\n"
        "while os.getppid() == parent:\n"
        "    time.sleep(0.01)\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        "watcher = 'import os; from storage.processes.supervisor import watch; watch(os.getppid(), last_s=2)'\n"
        "subprocess.Popen([sys.executable, '-c', watcher])\n"
        f"subprocess.run([sys.executable, '-c', {late!r}, sys.argv[1], sys.argv[2]])\n"
    )
    running = start(tmp_path, STUBBORN, parent=parent)
    try:
        time.sleep(1)  # the watcher looks five times a second
        running.process.kill()
        assert running.wait_until_gone(60) == {}
    finally:
        running.kill()


def test_a_killed_supervisor_takes_its_command_along(tmp_path: Path) -> None:
    """The parent inherits the grandchildren, and ends them when it leaves; nobody else would."""
    running = start(tmp_path, WAITS, parent=PARENT + "else:\n    exit_now(1)\n")
    try:
        (supervisor,) = [pid for pid, line in running.processes().items() if "supervisor.py" in line]
        os.kill(supervisor, signal.SIGKILL)
        assert running.wait(60) == 1
        assert "ended with -9" in running.text()
        assert running.processes() == {}
    finally:
        running.kill()
