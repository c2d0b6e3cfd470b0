"""An S3 endpoint on loopback (moto's HTTP server), and in front of it a store that is busy, fails or is slow."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from storage.backends.object_store import shared_store

BUCKET = "test-bucket"
_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_BROKEN = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class Trouble:
    """A WSGI application before another one. Which requests fail, and how, is decided by its fields."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._rng = random.Random(0)
        self.busy_fraction = 0.0  # of requests that are answered 503 before anything is done
        self.lost_fraction = 0.0  # of requests that are done, but answered 500
        self.delay_s = 0.0  # before each answer
        self.requests: Counter[str] = Counter()  # by method
        self.num_busy = self.num_lost = 0
        self.bytes_sent = 0

    def calm(self) -> None:
        """From now on every request is answered well, and counted from 0."""
        self.busy_fraction = self.lost_fraction = self.delay_s = 0.0
        self.num_busy = self.num_lost = self.bytes_sent = 0
        self.requests.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(self.delay_s)
        with self._lock:  # S3 decides conditional writes one by one; moto asks first and writes then
            self.requests[environ["REQUEST_METHOD"]] += 1
            if self._rng.random() < self.busy_fraction:
                self.num_busy += 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _answer(start_response, "503 Slow Down", _BUSY)
            if self._rng.random() < self.lost_fraction:
                self.num_lost += 1
                b"".join(self._app(environ, lambda status, headers, error=None: None))
                return _answer(start_response, "500 Internal Server Error", _BROKEN)
            content = list(self._app(environ, start_response))
            self.bytes_sent += sum(map(len, content))
            return content


def _answer(start_response: Callable[..., Any], status: str, content: bytes) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
    return [content]


@contextmanager
def run_s3() -> Iterator[tuple[str, Trouble]]:
    """The endpoint's URL, and its trouble."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    trouble = Trouble(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, trouble, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", trouble
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def set_s3_environment() -> Iterator[Trouble]:
    """A running endpoint that this process and its children find in the environment, with an empty bucket."""
    with run_s3() as (url, trouble), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()  # of an earlier server of this process
        driver = fsspec.get_filesystem_class("s3")
        for forget in (driver.clear_instance_cache, shared_store.cache_clear):  # whose endpoint is the earlier one
            forget()
        fsspec.filesystem("s3").mkdir(BUCKET)
        trouble.calm()
        yield trouble
        for forget in (driver.clear_instance_cache, shared_store.cache_clear):
            forget()


@contextmanager
def set_silent_s3() -> Iterator[socket.socket]:
    """An endpoint in the environment that takes connections and never answers; its listening socket."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        driver = fsspec.get_filesystem_class("s3")
        for forget in (driver.clear_instance_cache, shared_store.cache_clear):
            forget()
        yield listener
        for forget in (driver.clear_instance_cache, shared_store.cache_clear):
            forget()
