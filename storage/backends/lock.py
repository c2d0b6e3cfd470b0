"""A lock on a folder: a file in or beside it that names its holder and shows whether the holder is alive.

    {"host": …, "boot_id": …, "pid_namespace": …, "pid": …, "process_started": …, "since": …, "command": …, "token": …}

The file is created exclusively, together with its content, so exactly one of several commands gets the
lock, on a shared disk too. While the lock is held, a thread updates the file's time every few seconds.

A holder on this machine (same host, boot and process namespace) is dead if its pid is gone or belongs to
a process that started at another time. A holder on another machine is dead if the file's time did not
change while we watched it for a minute; the clocks of two machines are never compared.

To take over a dead holder's lock, a command first gets a second lock whose name contains the dead
holder's token. It then reads the first lock again and replaces it only if it is still the dead holder's,
so exactly one of several commands takes over.
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
    """The intervals of a lock's heartbeat; they must be the same for all users of a lock."""

    beat_s: float = 5.0  # between two updates of the file's time
    quiet_s: float = 60.0  # without update until the holder is dead; long, as shared disks show times late


HEARTBEAT = Heartbeat()


class HeldError(ConfigError):
    """Another command is using the folder."""


@dataclass(frozen=True)
class _LockFile:
    """The content and time of a lock file when it was read."""

    content: bytes
    time_ns: int
    holder: dict[str, Any]  # empty if the file is not a complete lock file

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
        """Raises StillhouseError if another command took the lock because our heartbeat stopped."""
        if self._is_lost or not self._is_ours():
            raise StillhouseError(
                f"{self.path}: another command has taken this lock, because this command did not renew it for "
                f"{self._heartbeat.quiet_s:.0f} s; nothing more is written. Run the same command again when the "
                "other command has ended"
            )

    def release(self) -> None:
        """Removes the lock file if it is still ours."""
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
            except OSError:  # the disk may answer again at the next beat
                continue


@contextmanager
def hold_lock(path: Path, what: str, *, patience_s: float = 0, heartbeat: Heartbeat = HEARTBEAT) -> Iterator[Lock]:
    """Holds the lock file `path` while the block runs. `what`: the locked thing, for messages.

    `patience_s`: seconds to wait for a living holder to end. Errors: HeldError naming the holder; ConfigError
    if the lock file cannot be written.
    """
    content = _describe_this_process()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(path, what, content, heartbeat, patience_s=patience_s)
    except OSError as error:
        is_file = isinstance(error, FileExistsError)  # of mkdir: a folder of the path is a file
        raise ConfigError(
            f"{path}: this lock on {what} cannot be written: {'Not a directory' if is_file else error.strerror}; "
            "free space, fix the folder's permissions, or use another folder"
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
        if seen is None:  # released in the meantime
            continue
        is_alive = _is_holder_alive(seen.holder)
        if is_alive is None:  # on another machine: only its heartbeat is known
            if watched is None or watched.content != seen.content:
                watched, since = seen, time.monotonic()
            elif watched.time_ns != seen.time_ns:
                is_alive, watched, since = True, seen, time.monotonic()  # but it may die while we wait
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
            said = time.monotonic() - _LOG_EVERY_S / 2  # a short wait for a living holder is not logged
        time.sleep(_POLL_S)


def _take_over(path: Path, dead: _LockFile, content: bytes, heartbeat: Heartbeat) -> bool:
    """Replaces a dead holder's lock by ours; returns False if another command did so first."""
    guard = path.with_name(f"{path.name}.after-{dead.token}")
    with hold_lock(guard, f"the lock {path.name}", patience_s=math.inf, heartbeat=heartbeat):
        now = _read_lock_file(path)
        if now is None or now.content != dead.content:
            return False
        write_atomically(path, content)
        return True


def _create_lock_file(path: Path, content: bytes) -> bool:
    """Creates the lock file with its content; returns False if it exists."""
    temporary = write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        seen = _read_lock_file(path)
        return seen is not None and seen.content == content  # a network disk may report success as a failure
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
    """Reads the lock file; returns None if it does not exist."""
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
    """Returns whether a holder on this machine is alive; None for a holder on another machine."""
    here = _describe_machine()
    if any(holder.get(name) != value for name, value in here.items()) or not isinstance(holder.get("pid"), int):
        return None
    started = read_process_start(holder["pid"])
    if started is not None:
        return started == holder.get("process_started")
    return False if Path("/proc/self/stat").exists() else _is_running(holder["pid"])


def _is_running(pid: int) -> bool:
    """Returns whether a process exists, on systems without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_process_start(pid: int) -> int | None:
    """Returns the start of a local process in clock ticks since boot; None if it has ended."""
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
