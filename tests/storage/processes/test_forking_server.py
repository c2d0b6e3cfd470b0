"""Calls in forks of a server: separate as processes of their own, and none outlives whoever started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.processes.forking_server import ForkingServer
from storage.processes.supervisor import list_descendants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervised commands need Linux")
ROOT = Path(__file__).resolve().parents[3]

SERVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from storage.processes.forking_server import serve

STATE = []

def call(arguments):
    word, *rest = arguments
    if word == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(143)))
    print(word, os.environ.get("COLOUR"), os.getcwd(), len(STATE), sys.stdin.read() == "", flush=True)
    STATE.append(word)
    if word == "fail":
        raise RuntimeError("it broke")
    if word == "exit":
        sys.exit(int(rest[0]))
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait":
        time.sleep(600)
    if word == "leave":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
    if word == "kill_server":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return 0

sys.exit(serve(call, prepare=lambda: print("ready", flush=True)))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkingServer]:
    script = tmp_path / "server.py"
    script.write_text(SERVER.format(root=str(ROOT)))
    with (tmp_path / "errors").open("wb") as errors:
        server = ForkingServer([sys.executable, str(script)], env=os.environ, grace_s=60.0, errors=errors)
        yield server
        server.close()


def wait_until(is_true: Callable[[], bool], *, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_call_is_a_process_of_its_own(server: ForkingServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for colour in ("red", "blue"):
        log.unlink(missing_ok=True)
        env = {"COLOUR": colour, "PATH": os.environ["PATH"]}
        assert server.run(["hello"], env=env, cwd=tmp_path, output=log) == 0
        assert log.read_text() == f"hello {colour} {tmp_path} 0 True\n"  # 0: no state of the call before
    assert server.run(["hello"], env={}, cwd=None, output=log) == 0
    assert log.read_text().count("hello") == 2  # appended


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [(["exit", "7"], 7, "exit"), (["fail"], 1, "RuntimeError: it broke"), (["die"], -signal.SIGKILL, "die")],
)
def test_a_failed_call_has_its_code_and_leaves_the_server(
    server: ForkingServer, tmp_path: Path, arguments: list[str], code: int, shown: str
) -> None:
    log = tmp_path / "log"
    assert server.run(arguments, env=os.environ, cwd=None, output=log) == code
    assert shown in log.read_text()
    assert server.run(["hello"], env=os.environ, cwd=None, output=log) == 0


def test_what_a_call_started_ends_with_it(server: ForkingServer, tmp_path: Path) -> None:
    assert server.run(["leave"], env=os.environ, cwd=None, output=tmp_path / "log") == 0
    wait_until(lambda: not any(_is_sleep(pid) for pid in list_descendants(os.getpid())))


def test_a_server_that_ends_is_noticed(server: ForkingServer, tmp_path: Path) -> None:
    assert server.run(["kill_server"], env=os.environ, cwd=None, output=tmp_path / "log") is None
    wait_until(lambda: not server.is_running)
    assert server.run(["hello"], env=os.environ, cwd=None, output=tmp_path / "log") is None


HOLDER = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from storage.processes.forking_server import ForkingServer
from storage.processes.stop_signals import interruptible

with interruptible(), open({log!r} + ".errors", "wb") as errors:
    server = ForkingServer([sys.executable, {script!r}], env=os.environ, grace_s=60.0, errors=errors)
    server.run(["wait"], env=os.environ, cwd=None, output=Path({log!r}))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_saves_its_state_and_ends_with_whoever_asked_for_it(tmp_path: Path, number: signal.Signals) -> None:
    script, log = tmp_path / "server.py", tmp_path / "log"
    script.write_text(SERVER.format(root=str(ROOT)))
    holder = HOLDER.format(root=str(ROOT), log=str(log), script=str(script))
    process = subprocess.Popen([sys.executable, "-c", holder], stderr=subprocess.DEVNULL)
    wait_until(lambda: log.exists() and "wait" in log.read_text())
    below = list_descendants(process.pid)
    assert len(below) >= 3  # supervisor, server, call
    process.send_signal(number)
    process.wait(60)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert "saved" in log.read_text()


def _is_sleep(pid: int) -> bool:
    try:
        return b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
