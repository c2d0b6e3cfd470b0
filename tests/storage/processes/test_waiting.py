from __future__ import annotations

import logging
import threading

import pytest

from storage.processes.waiting import Waiting, send_notices_to


class Notices:
    """Collects notices; `wait_for` so many of them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._came = threading.Condition()

    def __call__(self, notice: str) -> None:
        with self._came:
            self.said.append(notice)
            self._came.notify_all()

    def wait_for(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.said) >= count, timeout=60), self.said


def test_a_long_wait_is_told_of_again_and_again_until_its_end() -> None:
    notices, subjects = Notices(), iter(f"part {number}" for number in range(10**6))
    with Waiting(lambda: next(subjects), say=notices, first_s=0.01, every_s=0.01):
        notices.wait_for(3)
    assert [notice.partition(" (")[0] for notice in notices.said[:3]] == [
        f"still waiting for part {number}" for number in range(3)
    ]
    assert all(notice.endswith(" s so far)") for notice in notices.said)


def test_a_short_wait_is_not_told_of_and_a_failure_ends_it() -> None:
    notices, before = Notices(), threading.active_count()
    with pytest.raises(ZeroDivisionError), Waiting("nothing", say=notices, first_s=3600):
        raise ZeroDivisionError
    for thread in threading.enumerate():
        if thread.name == "waiting":
            thread.join(timeout=60)
    assert threading.active_count() <= before
    assert notices.said == []


def test_what_came_begins_a_new_wait() -> None:
    notices = Notices()
    with Waiting("a part", say=notices, first_s=3600, every_s=0.01) as waiting:
        waiting.reset()
    assert notices.said == []


def test_notices_go_where_a_person_looks(caplog: pytest.LogCaptureFixture) -> None:
    outer, inner = Notices(), Notices()
    with send_notices_to(outer):
        with send_notices_to(inner), Waiting("a lock", first_s=0.01, every_s=0.01):
            inner.wait_for(1)
        with Waiting("a disk", first_s=0.01, every_s=0.01):
            outer.wait_for(1)
    assert "a lock" in inner.said[0]
    assert "a disk" in outer.said[0]

    def gone(notice: str) -> None:
        raise OSError("no terminal")

    told = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: told.set()  # type: ignore[method-assign]
    logger = logging.getLogger("storage.processes.waiting")
    logger.addHandler(handler)
    try:
        with Waiting("Ray", say=gone, first_s=0.01, every_s=0.01):
            assert told.wait(timeout=60)
    finally:
        logger.removeHandler(handler)
