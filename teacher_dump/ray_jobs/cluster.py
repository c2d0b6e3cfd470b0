"""Connects to Ray, and checks that it has room for an engine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from storage.errors import ConfigError, StillhouseError
from storage.processes.child_process import end_descendants_on_exit
from storage.processes.search_path import find_shadowed_packages
from storage.processes.stop_signals import Interrupted, keep_handler
from storage.processes.waiting import Waiting

GPUS_OF_ACTORS = "dump.gpus_per_actor or teacher.settings"  # the fields that decide an actor's GPUs
_HOST_PORT = re.compile(r"[^/:]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
_ANSWER_S = 60.0  # for a Ray head to answer a first connection
_OBJECT_STORE_BYTES = 256 * 2**20  # of a local Ray; parts travel as text and results as a few numbers


@dataclass(frozen=True)
class Resources:
    """The resources that one actor or command requests of Ray."""

    num_cpus: float = 1
    num_gpus: float = 0  # without any, Ray hides all GPUs from it


@contextlib.contextmanager
def connect_to_ray(address: str | None, *, local_cpus: int) -> Iterator[bool]:
    """Connects to Ray while the block runs: an existing connection, a running cluster, or a new local Ray.

    Yields True if Ray runs on this machine only, and so cannot grow.

    Keeps the caller's SIGTERM handler, during the block and after it; Ray's own would end the process at once.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, local_cpus),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    folder = Path.cwd()
    if shadowed := find_shadowed_packages(folder):
        options["runtime_env"] = {"worker_process_setup_hook": _make_setup_hook(shadowed, besides=str(folder))}
    with contextlib.nullcontext() if address else end_descendants_on_exit():
        yield from _open_connection(address, options)


def _open_connection(address: str | None, options: dict[str, Any]) -> Iterator[bool]:
    if address:
        check_head_answers(address)
    try:
        with Waiting(f"Ray at {address}" if address else "Ray to start on this machine"), keep_handler(signal.SIGTERM):
            ray.init(**options)
    except (KeyboardInterrupt, SystemExit) as stop:  # SystemExit: of Ray's handler of SIGTERM
        with contextlib.suppress(Exception):  # Ray may be half started
            _shut_down()
        raise stop if isinstance(stop, KeyboardInterrupt) else Interrupted(signal.SIGTERM) from stop
    except (ConnectionError, ValueError, RayError, OSError, RuntimeError) as error:
        raise StillhouseError(
            f"cannot connect to Ray at {address or 'this machine'}: {get_last_line(error)}"
        ) from error
    try:
        yield not address
    finally:
        _shut_down()


def _shut_down() -> None:
    """Shuts Ray down and keeps SIGTERM's handler, which Ray's core resets in the kernel."""
    with keep_handler(signal.SIGTERM):
        ray.shutdown()


def check_room(resources: Resources, *, what: str, field: str) -> None:
    """Raises ConfigError if a Ray that cannot grow has no room for even one of `what`: it would wait for ever.

    `field`: the config field that requests its GPUs.
    """
    there = ray.cluster_resources().get("GPU", 0)
    if resources.num_gpus > there:
        raise ConfigError(
            f"{field}: {what} wants {resources.num_gpus:g} GPUs and Ray has {there:g} on this machine; ask for fewer, "
            "or give dump.ray_address (or RAY_ADDRESS) of a cluster that has them"
        )


def _make_setup_hook(packages: Sequence[str], *, besides: str) -> Callable[[], None]:
    """Makes a worker's setup hook that imports our packages although files in folder `besides` hide them.

    Ray puts that folder first on a worker's sys.path, before the first task or after this hook. A nested function is
    pickled as code, so the worker needs no module of ours to run it.
    """

    def import_packages() -> None:
        import importlib
        import sys

        kept = sys.path
        sys.path = [entry for entry in kept if entry != besides]
        for package in packages:
            importlib.import_module(package)
        sys.path = kept

    return import_packages


def check_head_answers(address: str, *, limit_s: float = _ANSWER_S) -> None:
    """Raises StillhouseError if no Ray head answers at host:port; Ray itself would wait without a message.

    Does not check other kinds of address (auto, ray://…) and encrypted ones, for which Ray has a timeout.
    """
    if not _HOST_PORT.fullmatch(address) or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc

    with Waiting(f"an answer of a Ray head at {address}"), grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=limit_s)
        except grpc.FutureTimeoutError as error:
            raise StillhouseError(
                f"cannot connect to Ray at {address}: no answer within {limit_s:g} s; check dump.ray_address, or "
                "RAY_ADDRESS, and that `ray status --address …` answers from this machine"
            ) from error


def resolve_num_gpus(wanted: float | None, default: float) -> float:
    """Returns `wanted`; if it is None, `default` in a cluster with GPUs and 0 in one without."""
    if wanted is not None:
        return wanted
    return default if ray.cluster_resources().get("GPU", 0) else 0


def count_engine_gpus(settings: Mapping[str, Any]) -> int:
    """Returns how many GPUs one engine uses, by its settings for vLLM."""
    return settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)


def warn_about_room(num_actors: int, resources: Resources, notify: Callable[[str], None]) -> None:
    """Notifies of resources that the cluster lacks: an autoscaler may still add them."""
    room = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        if room.get(kind, 0) < num_actors * wanted:
            notify(
                f"Ray has {room.get(kind, 0):g} {kind}s and the {num_actors} actors want {num_actors * wanted:g}; "
                "those that find no room wait for the cluster to grow"
            )


def describe_lacking_room(resources: Resources, *, over_nodes: bool = False) -> str:
    """Describes the resources that no node has, or with `over_nodes` not even the whole cluster; "" if none."""
    nodes = [ray.cluster_resources()] if over_nodes else [node["Resources"] for node in ray.nodes() if node["Alive"]]
    lacks = []
    for kind, wanted in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)):
        most = max((node.get(kind, 0) for node in nodes), default=0)
        if most < wanted:
            lacks.append(f"{wanted:g} {kind}s, where {'the cluster' if over_nodes else 'a node'} has {most:g} at most")
    return " and ".join(lacks)


def get_last_line(error: BaseException) -> str:
    """Returns the last line of one of Ray's long messages, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
