"""SIGTERM and SIGINT end every verb with 143 and 130 and one sentence, wherever it is."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.processes.stop_signals import Interrupted, find_stop_signal, get_exit_code, hold_signals, interruptible
from tests.processes import MarkedCommand, start_marked

ROOT = Path(__file__).parents[2]
SLOW_END = """
import atexit, os, sys
import stillhouse.__main__ as stillhouse_main, teacher_dump.__main__ as dump_main
from storage.processes.stop_signals import end_process
pipe, which, *sys.argv[1:] = sys.argv[1:]
atexit.register(lambda: open(pipe).read())  # what a library does while the interpreter ends, until it is interrupted
if which == "rank":
    end_process(0)
sys.exit({"verb": stillhouse_main, "dump": dump_main}[which].main())
"""
PATIENCE_S = 120.0


@contextmanager
def blocked_in(path: Path, running: MarkedCommand) -> Iterator[None]:
    """Waits until a command reads this pipe, and lets it wait for more.

    It has to be within the system call: a signal shortly before it would not end it.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert running.process.poll() is None, running.text()
        assert time.monotonic() < deadline, running.text()
        try:
            writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.02)
    deadline = time.monotonic() + 5  # some kernels do not tell where a process waits
    while "pipe_read" not in Path(f"/proc/{running.process.pid}/wchan").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield
    os.close(writer)


@pytest.mark.parametrize(
    ("command", "pipe"),
    [
        ("-m stillhouse run {pipe}", "file.yaml"),
        ("-m stillhouse dump {pipe}", "file.yaml"),
        ("-m stillhouse report {folder}", "ablations.json"),
        ("-m teacher_dump {pipe}", "file.yaml"),
        ("-m teacher_dump.execution.answer_job {pipe} 0 1", "job.json"),
        ("-m student_train.evaluate {pipe} --model {folder}", "file.yaml"),
        ("student_train/main.py {pipe} --stage a", "file.yaml"),
    ],
)
def test_a_signal_ends_a_command_with_its_code(tmp_path: Path, command: str, pipe: str) -> None:
    """The command waits for its first file, which is a pipe that nobody fills."""
    path = tmp_path / pipe
    os.mkfifo(path)
    number = (signal.SIGTERM, signal.SIGINT)[len(command) % 2]
    words = command.format(pipe=path, folder=tmp_path).split()
    running = start_marked([sys.executable, *words], tmp_path / "log", cwd=ROOT)
    try:
        with blocked_in(path, running):
            running.process.send_signal(number)
            assert running.wait(60) == 128 + number, running.text()
    finally:
        running.kill()
    assert running.text().strip().endswith("what is finished is kept, and the same command resumes")
    assert running.text().count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("which", "words", "code"), [("verb", ["dump", "no.yaml"], 2), ("dump", ["no.yaml"], 2), ("rank", [], 0)]
)
def test_a_signal_while_the_interpreter_ends_changes_no_exit_code(
    tmp_path: Path, which: str, words: list[str], code: int, number: signal.Signals
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    running = start_marked([sys.executable, "-c", SLOW_END, str(path), which, *words], tmp_path / "log", cwd=ROOT)
    try:
        with blocked_in(path, running):
            before = running.text()
            running.process.send_signal(number)
            assert running.wait(60) == code, running.text()
    finally:
        running.kill()
    assert running.text() == before


def test_codes_are_those_of_shells() -> None:
    assert get_exit_code(Interrupted(signal.SIGTERM)) == 143
    assert get_exit_code(KeyboardInterrupt()) == 130
    assert [find_stop_signal(code) for code in (143, -15, 130, -2, 0, 1, 2, -9)] == [
        15,
        15,
        2,
        2,
        None,
        None,
        None,
        None,
    ]


def test_a_held_signal_waits_and_a_repeated_one_is_the_same() -> None:
    with interruptible(), hold_signals() as held:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert held.event.wait(10)
    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        held.raise_interrupted()
    assert caught.value.number == signal.SIGTERM


def test_an_interruption_that_a_library_has_replaced_keeps_its_signal() -> None:
    def replace() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray's core does

    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        replace()


def test_a_signal_that_a_library_swallowed_is_heard_by_whoever_holds_signals() -> None:
    with interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except BaseException:  # as some libraries do
            pass
        with hold_signals() as held:
            assert held.number == signal.SIGINT
    with hold_signals() as held:
        assert held.number is None
