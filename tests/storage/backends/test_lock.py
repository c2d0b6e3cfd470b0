"""A lock has one holder, which it names; a dead holder's lock is taken over by one of many takers."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from storage.backends.lock import Heartbeat, HeldError, hold_lock, read_process_start

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from storage.backends.lock import hold_lock
with hold_lock(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    time.sleep(600)
"""
TAKER = """
import sys, time
from pathlib import Path
from storage.backends.lock import HeldError, hold_lock
path, log = Path(sys.argv[1]), Path(sys.argv[2])
sys.stdin.readline()
try:
    with hold_lock(path, "the run"):
        with log.open("a") as file:
            file.write("in ")
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("out ")
except HeldError:
    pass
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_held_message(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


def write_lock(path: Path, **changes: Any) -> bytes:
    """A lock as this process would have it, but for some fields; its holder is silent."""
    with hold_lock(path, "the run"):
        document = json.loads(path.read_bytes())
    content = json.dumps({**document, "token": "0" * 32, **changes}).encode()
    path.write_bytes(content)
    return content


FAST = Heartbeat(beat_s=0.1, quiet_s=3.0)


def test_a_living_holder_is_named_and_its_lock_comes_free_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "lock"
    holder = start(HOLDER, path)
    assert read_held_message(holder)
    with pytest.raises(HeldError) as caught, hold_lock(path, "the run"):
        pass
    message = str(caught.value)
    assert f"process {holder.pid} on {os.uname().nodename}, since 20" in message
    assert "the run is in use by" in message
    assert "python" in message
    assert "stop it" in message
    holder.terminate()
    holder.communicate()
    with hold_lock(path, "the run"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_the_lock_of_a_killed_holder_is_taken_over_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    holder = start(HOLDER, path)
    assert read_held_message(holder)
    holder.send_signal(signal.SIGKILL)
    with caplog.at_level(logging.WARNING), hold_lock(path, "the run", patience_s=math.inf):  # a zombie counts as dead
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    holder.communicate()
    assert [f"process {holder.pid}" in record.message for record in caplog.records] == [True]
    assert "taken over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_another_process_has_now_is_no_living_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    started = read_process_start(os.getpid())
    assert started is not None
    write_lock(path, process_started=started - 1)
    with hold_lock(path, "the run"):
        pass
    write_lock(path)
    with pytest.raises(HeldError), hold_lock(path, "the run"):
        pass


@pytest.mark.parametrize(
    "elsewhere", [{"host": "another"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"pid": "torn"}]
)
def test_a_holder_elsewhere_is_dead_only_when_its_heartbeat_has_stopped(
    tmp_path: Path, elsewhere: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    content = write_lock(path, **elsewhere, process_started=1)
    ends = threading.Event()

    def beat() -> None:
        while not ends.wait(0.1):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(HeldError), hold_lock(path, "the run", heartbeat=FAST):
        pass
    ends.set()
    beating.join()
    assert path.read_bytes() == content
    before = time.monotonic()
    with hold_lock(path, "the run", heartbeat=FAST):
        assert time.monotonic() - before >= 3
    assert "waiting for a sign of life" in caplog.text


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    path, log = tmp_path / "lock", tmp_path / "log"
    takers = [start(TAKER, path, log) for _ in range(8)]
    write_lock(path, process_started=1)
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("go\n")
        taker.stdin.flush()
    for taker in takers:
        taker.communicate()
        assert taker.returncode == 0
    said = log.read_text().split()
    assert said
    assert said == ["in", "out"] * (len(said) // 2)  # never two at once
    assert [item.name for item in tmp_path.iterdir()] == ["log"]


def test_a_taker_that_died_at_it_does_not_bar_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_lock(path, process_started=1)
    write_lock(tmp_path / f"lock.after-{'0' * 32}", process_started=1, token="1" * 32)
    with hold_lock(path, "the run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_silent_for_too_long_notices(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path, "the run", heartbeat=FAST) as lock:
        lock.check()
        content = path.read_bytes().replace(b'"pid"', b'"was"')
        path.write_bytes(content)
        with pytest.raises(Exception, match="another command has taken this lock"):
            lock.check()
    assert path.read_bytes() == content  # it is not ours to remove


def test_a_held_lock_shows_signs_of_life(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path, "the run", heartbeat=FAST):
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 60
        while path.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Exception, match="this lock on the run cannot be written"),
        hold_lock(tmp_path / "file" / "l", "the run"),
    ):
        pass
