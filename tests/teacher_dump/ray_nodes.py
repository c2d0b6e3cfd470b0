"""A Ray cluster of several nodes on one machine, as processes that tests may kill.

Run as a module it is the cluster: it starts a head without CPUs, prints its address, and adds a node of one CPU for
each line that it reads. Ends, with every node, when its input does.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_OBJECT_STORE_BYTES = 80 * 2**20
_RAYLET = "raylet/raylet"


@dataclass(frozen=True)
class RayNodes:
    """A running cluster."""

    process: subprocess.Popen[str]
    environment: dict[str, str]  # to talk to it in; RAY_ADDRESS is its GCS
    head: int  # the head's raylet

    def add(self) -> None:
        """Starts one more node and waits for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "added\n"

    def raylets(self) -> list[int]:
        """Of the nodes besides the head."""
        return [pid for pid in children(self.process.pid, _RAYLET) if pid != self.head]

    def workers(self) -> list[int]:
        """Processes of actors that are there or about to be, on all nodes, the head's as well."""
        return [pid for raylet in (self.head, *self.raylets()) for pid in children(raylet, "ray::")]


@contextmanager
def ray_nodes(num_nodes: int) -> Iterator[RayNodes]:
    """A head, and nodes of one CPU each."""
    token = secrets.token_hex(32)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
        "RAY_enable_metrics_collection": "0", "RAY_worker_niceness": "0",  # else 15
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.teacher_dump.ray_nodes"], cwd=REPOSITORY, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        (head,) = children(process.pid, _RAYLET)
        nodes = RayNodes(process, {**environment, "RAY_ADDRESS": address}, head)
        for _ in range(num_nodes):
            nodes.add()
        yield nodes
    finally:
        process.stdin.close()
        process.wait(timeout=600)
        process.stdout.close()


def children(parent: int, named: str) -> list[int]:
    """Living child processes whose command line has some text in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):  # it is gone
            continue
        if int(ppid) == parent and state != "Z" and named in command and "Agent" not in command:  # Ray's own agents
            found.append(int(folder.name))
    return found


def _main() -> None:
    from ray.cluster_utils import Cluster

    sys.stdout, answers = sys.stderr, sys.stdout
    arguments = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    print(cluster.address, file=answers, flush=True)
    for _ in sys.stdin:
        cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES)
        print("added", file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main()
