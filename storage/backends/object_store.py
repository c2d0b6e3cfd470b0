"""A cache's folder in an object store, through fsspec; needs no rename, no lock and no consistent listing.

The PUT of a whole object is atomic. `cache.json`, segments and commits are created by a conditional PUT
(If-None-Match: *), so that exactly one of several writers wins. Credentials and endpoint come from the
environment.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.asyn import AsyncFileSystem
from fsspec.core import strip_protocol

from storage.errors import CacheError
from storage.processes.waiting import Waiting

# Stores with atomic and conditional writes of whole objects; `memory` is fsspec's own, for tests.
_ATOMIC_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between attempts: a minute, longer than throttling lasts
_MAX_RETRIES_WITHOUT_CONTACT = 2  # of an unreachable store that never answered: probably a wrong address
_TRANSIENT_STATUS = (408, 409, 425, 429)  # 409: S3 asks to repeat a conditional PUT that met another one
_TRANSIENT_ERRORS = ("HTTPClientError", "ResponseParserError", "ClientConnectionError", "ClientPayloadError")
_CONNECT_S = 10.0  # to open a connection
_ATTEMPT_S = 30.0  # for one attempt of a request, besides its bytes
_LISTING_S = 600.0  # for one attempt of a listing, which may have a thousand pages
_TOTAL_S = 180.0  # for all attempts of a request, besides its bytes; throttling ends within a minute
_TOTAL_WITHOUT_CONTACT_S = 75.0  # the same for a store that never answered this process
_NOTICE_S = 30.0
_MIN_BYTES_PER_S = 256 << 10  # of the slowest connection that is accepted
_HASH_BLOCK_BYTES = 16 << 20
_DRIVERS = {"s3": "stillhouse[s3]", "s3a": "stillhouse[s3]", "gs": "gcsfs", "gcs": "gcsfs"}

_log = logging.getLogger(__name__)
T = TypeVar("T")


def open_object_folder(url: str) -> ObjectFolder:
    """Returns the folder at a URL without accessing the store. CacheError if fsspec has no driver."""
    folder = ObjectFolder(url.rstrip("/"))
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        missing = f"pip install '{_DRIVERS[protocol]}'" if protocol in _DRIVERS else "install its fsspec driver"
        raise CacheError(f"{url}: {protocol}:// cannot be opened: {error}; {missing}") from error
    return folder


@dataclass(frozen=True)
class ObjectFolder:
    """The objects below a URL's prefix. It holds no connection, so it can be forked or pickled."""

    url: str  # s3://bucket/prefix, without a final slash
    pauses_s: tuple[float, ...] = _PAUSES_S  # before each further attempt when the store is busy or fails
    attempt_s: float = _ATTEMPT_S  # and some more for large objects and for listings
    total_s: float = _TOTAL_S  # of all attempts of a request; no attempt begins later
    notice_s: float = _NOTICE_S  # until a long wait is logged

    def __str__(self) -> str:
        return self.url

    @property
    def is_remote(self) -> bool:
        return True

    def locate(self, name: str) -> str:
        return f"{self.url}/{name}"

    def make_folders(self, subs: Iterable[str]) -> None:
        """Checks that the store writes objects atomically (else CacheError); creates nothing."""
        protocol = self.url.partition("://")[0]
        if protocol not in _ATOMIC_STORES:
            known = ", ".join(f"{name}://" for name in _ATOMIC_STORES[:-1])
            raise CacheError(f"{self.url}: a cache can be written to a local folder or {known}, not to {protocol}://")

    def read(self, name: str) -> bytes:
        return self._request(name, lambda store, path: store.cat_file(path), is_long=True)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Returns bytes start : stop of an object. Errors as `read`."""
        content = self._request(
            name, lambda store, path: store.cat_file(path, start=start, end=stop), num_bytes=stop - start
        )
        if len(content) != stop - start:
            raise OSError(f"{self.locate(name)}: got {len(content)} bytes for the range {start}:{stop}")
        return content

    def size(self, name: str) -> int:
        return int(self._request(name, lambda store, path: store.info(path))["size"])

    def sha256(self, name: str) -> str:
        digest, size = hashlib.sha256(), self.size(name)
        for start in range(0, size, _HASH_BLOCK_BYTES):
            digest.update(self.read_range(name, start, min(start + _HASH_BLOCK_BYTES, size)))
        return digest.hexdigest()

    def open_for_arrow(self, name: str, num_bytes: int) -> pa.NativeFile:
        return pa.PythonFile(_RangeReader(self, name, num_bytes), mode="r")

    def write(self, name: str, content: bytes) -> None:
        self._write_object(name, content, "overwrite")

    def create(self, name: str, content: bytes) -> bool:
        # If the response of a successful attempt is lost, the next attempt finds the object and returns False;
        # the caller then reads the existing object, which is its own.
        try:
            self._write_object(name, content, "create")
        except FileExistsError:
            return False
        return True

    def list_files(self, sub: str = "", *, deep: bool = False) -> list[str]:
        try:
            found = self._request(sub, lambda store, path: _list_objects(store, path, deep=deep), is_long=True)
        except FileNotFoundError:
            return []
        return sorted(f"{sub}/{name}" if sub else name for name in found)

    def remove(self, name: str) -> None:
        try:
            self._request(name, lambda store, path: store.rm_file(path))
        except FileNotFoundError:
            return

    def _write_object(self, name: str, content: bytes, mode: str) -> None:
        try:
            self._request(name, lambda store, path: store.pipe_file(path, content, mode=mode), num_bytes=len(content))
        except FileNotFoundError as error:
            raise CacheError(f"{self.locate(name)}: cannot be written: {error}; create the bucket first") from error

    def _request(self, name: str, request: Callable[[Any, str], T], *, num_bytes: int = 0, is_long: bool = False) -> T:
        """Sends a request and returns the response; retries with growing pauses while the store is busy or fails.

        `num_bytes`: the size of the transfer; `is_long`: the size is unknown. Errors: FileNotFoundError,
        FileExistsError, CacheError for all other failures.
        """
        place, attempts, begun = self.locate(name), 0, time.monotonic()
        contact = _get_contact(self.url, os.getpid())
        transfer_s = num_bytes / _MIN_BYTES_PER_S
        attempt_s = max(self.attempt_s, _LISTING_S) if is_long else self.attempt_s + transfer_s
        with Waiting(lambda: f"an answer of {place}, attempt {attempts + 1}", first_s=self.notice_s):
            while True:
                try:
                    store = _StoreWithTimeout(shared_store(self.url, os.getpid()), attempt_s)
                    answer = request(store, strip_protocol(place.rstrip("/")))
                    contact.has_answered = True
                    return answer
                except (FileNotFoundError, FileExistsError, TypeError, AttributeError):
                    raise
                except Exception as error:  # each driver raises its own types
                    if _find_http_status(error) == 412:  # the object of a conditional PUT exists
                        raise FileExistsError(place) from error
                    attempts += 1
                    contact.has_answered |= _find_http_status(error) is not None
                    patience = (
                        len(self.pauses_s)
                        if contact.has_answered or not _is_unreachable(error)
                        else _MAX_RETRIES_WITHOUT_CONTACT
                    )
                    total_s = min(self.total_s, _TOTAL_WITHOUT_CONTACT_S) if not contact.has_answered else self.total_s
                    waited_s = time.monotonic() - begun
                    is_over = attempts > min(patience, len(self.pauses_s)) or waited_s >= total_s + transfer_s
                    if not _is_transient(error) or is_over:
                        raise CacheError(_describe_failure(place, error, attempts, waited_s)) from error
                    _log.warning("%s: the request failed and is retried: %s", place, _describe_error(error))
                time.sleep(self.pauses_s[attempts - 1] * random.uniform(0.7, 1.3))


class _StoreWithTimeout:
    """Wraps a driver so that its requests raise TimeoutError after `limit_s`, if it supports timeouts."""

    def __init__(self, store: Any, limit_s: float) -> None:
        self._store = store
        self._limit_s = limit_s

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        is_asynchronous = isinstance(self._store, AsyncFileSystem)  # all drivers of real stores; `memory` is not
        return partial(method, timeout=self._limit_s) if is_asynchronous else method


class _RangeReader(io.RawIOBase):
    """A file object that Arrow reads an object through, with one range request per read."""

    def __init__(self, folder: ObjectFolder, name: str, num_bytes: int) -> None:
        self._folder = folder
        self._name = name
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        stop = self._position + (left if size < 0 else min(size, left))
        content = self._folder.read_range(self._name, self._position, stop) if stop > self._position else b""
        self._position = stop
        return content


@dataclass
class _StoreContact:
    """Records whether a store ever answered this process."""

    has_answered: bool = False


@lru_cache(maxsize=16)
def _get_contact(url: str, process: int) -> _StoreContact:
    return _StoreContact()


@lru_cache(maxsize=16)
def shared_store(url: str, process: int) -> Any:
    """Returns fsspec's driver for a URL, shared by all threads of a process to share its connections."""
    # No cached listings, since other writers commit at the same time. On S3 only this module retries.
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": _CONNECT_S,
            "read_timeout": _ATTEMPT_S,
        }
    return fsspec.url_to_fs(url, **options)[0]


def _list_objects(store: Any, path: str, *, deep: bool) -> list[str]:
    """Returns the names of the objects below a path, relative to it."""
    found = (
        store.find(path) if deep else [item["name"] for item in store.ls(path, detail=True) if item["type"] == "file"]
    )
    return [name[len(path) :].lstrip("/") for name in found if name.startswith(path.rstrip("/") + "/")]


def _list_causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _find_http_status(error: BaseException) -> int | None:
    """Returns the HTTP status of a driver's error, or None."""
    for link in _list_causes(error):
        response = getattr(link, "response", None)  # botocore
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return response["ResponseMetadata"].get("HTTPStatusCode")
        for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
            if isinstance(getattr(link, name, None), int):
                return getattr(link, name)
    return None


def _describe_failure(place: str, error: BaseException, attempts: int, waited_s: float) -> str:
    if _is_transient(error):
        return (
            f"{place}: the store failed in {attempts} attempts: {_describe_error(error)} ({waited_s:.0f} s in all); "
            "run the same command again when it answers: committed parts are kept"
        )
    return (
        f"{place}: the store refuses: {_describe_error(error)}; check the credentials, their permissions and the "
        "endpoint in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …)"
    )


def _is_transient(error: BaseException) -> bool:
    status = _find_http_status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    kinds = {kind.__name__ for link in _list_causes(error) for kind in type(link).__mro__}
    return bool(kinds & {"TimeoutError", "ConnectionError", *_TRANSIENT_ERRORS})


def _is_unreachable(error: BaseException) -> bool:
    """Returns True if no server was reached: an unknown host or a refused connection."""
    kinds = {kind.__name__ for link in _list_causes(error) for kind in type(link).__mro__}
    return bool(kinds & {"EndpointConnectionError", "ConnectionRefusedError", "ClientConnectorError", "gaierror"})


def _describe_error(error: BaseException) -> str:
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
