"""A lock on a folder: one file beside or in it that names its holder, and that shows whether the holder is alive.

    {"host": …, "boot_id": …, "pid_namespace": …, "pid": …, "process_started": …, "since": …, "command": …, "token": …}

The file is created exclusively, with its content, so of several commands one wins, on a shared disk too. While the
lock is held a thread renews the file's time every few seconds.

A holder on this machine (same host, boot and process namespace) is dead if its pid is gone, or belongs to a process
that started at another time. Of a holder elsewhere only the heartbeat is known: it is dead once the file's time did
not change while we watched for a minute; clocks of two machines are never compared.

A dead holder's lock is taken over under a second lock whose name holds the dead holder's token. Whoever has that one
looks again, and replaces the lock only if it is still the dead holder's: of two takers one wins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.backends.folder import sync, write_atomically, write_temporary
from storage.errors import ConfigError, StillhouseError

_POLL_S = 0.2
_LOG_EVERY_S = 60.0
_COMMAND_LENGTH = 300
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heartbeat:
    """How a holder shows that it lives; the same for all who use a lock."""

    beat_s: float = 5.0  # between two signs of life
    quiet_s: float = 60.0  # without one it is dead: many missed beats, for a shared disk may show a file's time late


HEARTBEAT = Heartbeat()


class HeldError(ConfigError):
    """A folder that another command is using."""


@dataclass(frozen=True)
class _LockFile:
    """A lock file as it was read."""

    content: bytes
    time_ns: int
    holder: dict[str, Any]  # empty if the file is not ours, or not whole

    @property
    def token(self) -> str:
        return str(self.holder.get("token") or hashlib.sha256(self.content).hexdigest()[:32])

    def __str__(self) -> str:
        if not self.holder:
            return "a lock file that cannot be read"
        holder = self.holder
        return (
            f"`{holder.get('command')}`, process {holder.get('pid')} on {holder.get('host')}, "
            f"since {holder.get('since')}"
        )


class Lock:
    """A lock that this process holds. Made by `hold_lock`."""

    def __init__(self, path: Path, content: bytes, heartbeat: Heartbeat) -> None:
        self.path = path
        self._content = content
        self._heartbeat = heartbeat
        self._stop = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """StillhouseError if another command took the lock: this one was silent for too long."""
        if self._is_lost or not self._is_ours():
            raise StillhouseError(
                f"{self.path}: another command has taken this lock, because this one gave no sign of life for "
                f"{self._heartbeat.quiet_s:.0f} s; nothing more is written. Run the same command again when the other "
                "one has ended"
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        if not self._is_lost and self._is_ours():
            with suppress(OSError):
                self.path.unlink()

    def _is_ours(self) -> bool:
        seen = _read_lock_file(self.path)
        return seen is not None and seen.content == self._content

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat.beat_s):
            try:
                if not self._is_ours():
                    self._is_lost = True
                    _log.error("%s: another command has taken this lock", self.path)
                    return
                os.utime(self.path)
            except OSError:  # a disk that does not answer now may do so at the next beat
                continue


@contextmanager
def hold_lock(path: Path, what: str, *, patience_s: float = 0, heartbeat: Heartbeat = HEARTBEAT) -> Iterator[Lock]:
    """Within it this process holds the lock file `path`; `what` is locked, as messages name it.

    `patience_s`: how long to wait for a living holder to end. Errors: HeldError naming the holder; ConfigError: no file
    can be made there.
    """
    content = _describe_this_process()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(path, what, content, heartbeat, patience_s=patience_s)
    except OSError as error:
        is_file = isinstance(error, FileExistsError)  # of mkdir: a folder of the path is a file
        raise ConfigError(
            f"{path}: this lock on {what} cannot be written: {'Not a directory' if is_file else error.strerror}; "
            "free space or mend the folder's permissions, or write elsewhere"
        ) from error
    lock = Lock(path, content, heartbeat)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(path: Path, what: str, content: bytes, heartbeat: Heartbeat, *, patience_s: float) -> None:
    watched: _LockFile | None = None
    began = time.monotonic()
    since = said = -_LOG_EVERY_S
    while not _create_lock_file(path, content):
        seen = _read_lock_file(path)
        if seen is None:  # released meanwhile
            continue
        is_alive = _is_holder_alive(seen.holder)
        if is_alive is None:  # on another machine: only its heartbeat tells
            if watched is None or watched.content != seen.content:
                watched, since = seen, time.monotonic()
            elif watched.time_ns != seen.time_ns:
                is_alive, watched, since = True, seen, time.monotonic()  # and it may die while we wait
            elif time.monotonic() - since >= heartbeat.quiet_s:
                is_alive = False
        if is_alive is False:
            if _take_over(path, seen, content, heartbeat):
                _log.warning("%s: %s has ended without giving %s back; its lock is taken over", path, seen, what)
                return
            continue
        if is_alive and time.monotonic() - began >= patience_s:
            raise HeldError(
                f"{what} is in use by {seen}; wait until that command has ended, or stop it ({path} is its lock)"
            )
        if time.monotonic() - said >= _LOG_EVERY_S and (is_alive is None or said > 0):
            _log.warning("%s: waiting for %s", path, f"a sign of life of {seen}" if is_alive is None else seen)
            said = time.monotonic()
        elif said < 0:
            said = time.monotonic() - _LOG_EVERY_S / 2  # a short wait for a living holder needs no line
        time.sleep(_POLL_S)


def _take_over(path: Path, dead: _LockFile, content: bytes, heartbeat: Heartbeat) -> bool:
    """Replace a dead holder's lock by ours; False if somebody else was quicker."""
    guard = path.with_name(f"{path.name}.after-{dead.token}")
    with hold_lock(guard, f"the lock {path.name}", patience_s=math.inf, heartbeat=heartbeat):
        now = _read_lock_file(path)
        if now is None or now.content != dead.content:
            return False
        write_atomically(path, content)
        return True


def _create_lock_file(path: Path, content: bytes) -> bool:
    """Make the file with its content; False if there is one."""
    temporary = write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        seen = _read_lock_file(path)
        return seen is not None and seen.content == content  # a network disk may report its own success as failure
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _create_without_links(path, content)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read_lock_file(path: Path) -> _LockFile | None:
    """The lock as it is now; None if there is none."""
    try:
        with path.open("rb") as file:  # opening asks a network disk anew
            content, time_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(content)
    except ValueError:
        holder = {}
    return _LockFile(content, time_ns, holder if isinstance(holder, dict) else {})


def _is_holder_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a holder on this machine lives; None for one elsewhere."""
    here = _describe_machine()
    if any(holder.get(name) != value for name, value in here.items()) or not isinstance(holder.get("pid"), int):
        return None
    started = read_process_start(holder["pid"])
    if started is not None:
        return started == holder.get("process_started")
    return False if Path("/proc/self/stat").exists() else _is_running(holder["pid"])


def _is_running(pid: int) -> bool:
    """Whether there is such a process, where /proc is not there to ask."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])  # the 3rd field is the state, the 22nd the start


def _describe_machine() -> dict[str, str]:
    boot_id = namespace = ""
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())  # containers of one machine have pids of their own
    return {"host": socket.gethostname(), "boot_id": boot_id, "pid_namespace": namespace}


def _describe_this_process() -> bytes:
    command = " ".join(shlex.join(sys.orig_argv).split())
    document = {
        **_describe_machine(),
        "pid": os.getpid(),
        "process_started": read_process_start(os.getpid()),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": command if len(command) <= _COMMAND_LENGTH else f"{command[:_COMMAND_LENGTH]}…",
        "token": secrets.token_hex(16),
    }
    return json.dumps(document, indent=1).encode() + b"\n"
