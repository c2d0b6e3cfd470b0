"""A Ray cluster of one node with a dashboard, as one process group that ends with the tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.free_port import free_port

PATIENCE_S = 1200.0  # for a head that is there in ten seconds on an idle machine
_NUM_STARTS = 5  # with other ports each


@dataclass(frozen=True)
class RayHead:
    """A cluster of one node."""

    dashboard: str  # where jobs are submitted
    metrics: str  # what Prometheus would ask
    environment: dict[str, str]  # to talk to it in; RAY_ADDRESS is its GCS


@contextmanager
def running_ray_head() -> Iterator[RayHead]:
    """Starts a head with three CPUs and waits for it; tries other ports if one is taken."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        for number in range(1, _NUM_STARTS + 1):
            head, process = _start(Path(folder, str(number)))
            try:
                if _answers(head, process):
                    yield head
                    return
            finally:
                _end(process)
        log = Path(folder, str(_NUM_STARTS), "head.log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"Ray did not start: {log}")


def _start(folder: Path) -> tuple[RayHead, subprocess.Popen[bytes]]:
    folder.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_worker_niceness": "0",  # else 15
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # `ray start` wants one; this head's alone
        "RAY_metrics_report_interval_ms": "500",
    }
    port, dashboard_port, agent_port, metrics_port = (free_port() for _ in range(4))
    command = [
        "ray", "start", "--head", "--block", f"--temp-dir={folder}", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}", "--num-cpus=3", "--disable-usage-stats",
        f"--object-store-memory={100 * 2**20}", f"--metrics-export-port={metrics_port}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    metrics = f"http://127.0.0.1:{metrics_port}/metrics"
    environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    return RayHead(f"http://127.0.0.1:{dashboard_port}", metrics, environment), process


def _answers(head: RayHead, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the head takes jobs; False if it ended or stayed silent instead."""
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=token)).close()
            return True
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the head's own session, and nobody else's processes as `ray stop` would."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        time.sleep(2)
    process.wait()
