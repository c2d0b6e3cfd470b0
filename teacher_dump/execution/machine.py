"""Checks what Ray and vLLM need of the machine that starts them, before any work; one sentence per problem.

The numbers were measured with Ray 2.60 and vLLM 0.32 on 2 cores: with 64 file descriptors Ray never starts, with
256 it does; with little data, a temporary folder of 2 MB and a /dev/shm of 1 MB are enough.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage.backends.disk import check_writable, format_bytes, measure_free_bytes
from storage.backends.folder import open_folder
from storage.errors import ConfigError
from storage.layout.segments import has_cache
from storage.reader.cache import Cache
from teacher_dump.settings import DumpSettings
from teacher_dump.teachers.fingerprint import choose_backend

_FEW_FILES, _MANY_FILES = 256, 4096  # descriptors: without the first Ray may never start, large dumps want the second
_SHARED_BYTES = 64 << 20  # of /dev/shm, docker's default
_TEMPORARY_BYTES = 256 << 20  # Ray's logs, and objects that do not fit into memory
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # of AF_UNIX
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # below Ray's temporary folder
_RAY_TOKEN = Path(".ray") / "auth_token"  # which Ray makes below HOME where there is none
_SHARED_MEMORY = Path("/dev/shm")


def check_dump_machine(settings: DumpSettings) -> list[str]:
    """Runs `check_machine` and checks GPUs for a dump.

    Checks nothing if the dump needs no teacher, or its cache is sealed.
    """
    if not needs_teacher(settings) or is_sealed(settings.cache.path):
        return []
    check_engine_gpus(settings)
    model = settings.data.answering_model
    runs_vllm = settings.teacher.backend == "vllm"
    if model is not None:
        runs_vllm = runs_vllm or (model.backend or choose_backend()) == "vllm"
    return check_machine(runs_vllm=runs_vllm, ray_address=settings.dump.ray_address)


def check_machine(*, runs_vllm: bool, ray_address: str | None) -> list[str]:
    """Returns warnings about scarce resources. Raises ConfigError if Ray or vLLM could not start.

    `ray_address`: of a running cluster, whose machines are not checked.
    """
    return [
        *_check_home(),
        *_check_files(),
        *_check_temporary(is_local=is_local_ray(ray_address)),
        *_check_shared_memory(runs_vllm=runs_vllm),
    ]


def check_engine_gpus(settings: DumpSettings) -> None:
    """Raises ConfigError for an actor with fewer GPUs than its engine has ranks, or more than this machine has.

    Checks nothing for a cluster: only Ray knows which GPUs it has or may get.
    """
    if not is_local_ray(settings.dump.ray_address) or not needs_teacher(settings):
        return
    num_available, model = count_gpus(), settings.data.answering_model
    engines = {"teacher.settings": settings.teacher.settings}
    if model is not None:
        engines["data.responses.settings"] = model.settings
    for field, engine in engines.items():
        _check_ranks(field, engine, settings.dump.gpus_per_actor, num_available)


def _check_ranks(field: str, engine: Mapping[str, Any], gpus_per_actor: float | None, num_available: int) -> None:
    """Raises ConfigError if an engine's ranks need more GPUs than an actor gets, or an actor more than there are."""
    ranks = _num_ranks(engine)
    if gpus_per_actor is None:
        wanted, asking = (ranks if num_available else 0), f"{field}.tensor_parallel_size"
    else:
        wanted, asking = gpus_per_actor, "dump.gpus_per_actor"
    check_gpu_count(wanted, num_available, field=asking)
    by_ray = engine.get("distributed_executor_backend") == "ray"
    if num_available and 0 < wanted < ranks and not by_ray:
        raise ConfigError(
            f"dump.gpus_per_actor is {wanted:g}, but {field} make {ranks} ranks (tensor_parallel_size × "
            f"pipeline_parallel_size), each with a GPU of its own; give {ranks}, or leave it out"
        )


def check_gpu_count(wanted: float, num_available: int, *, field: str) -> None:
    """Raises ConfigError if one task wants more GPUs than this machine has: it would wait for ever."""
    if wanted > num_available:
        raise ConfigError(
            f"{field} asks for {wanted:g} GPUs and this machine has {num_available}: the work would wait for ever; "
            "ask for fewer, or give dump.ray_address of a cluster that has them"
        )


def count_gpus() -> int:
    """Returns how many GPUs Ray will find on this machine."""
    import torch

    found = torch.cuda.device_count()
    if not found and torch.version.cuda is None and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        drivers = Path("/proc/driver/nvidia/gpus")  # Ray sees them, whatever PyTorch was built for
        found = len(list(drivers.iterdir())) if drivers.is_dir() else 0
    xpu = getattr(torch, "xpu", None)
    return found or (xpu.device_count() if xpu is not None else 0)


def is_local_ray(ray_address: str | None) -> bool:
    """Returns whether Ray will run on this machine only, not on an existing cluster."""
    return not (ray_address or os.environ.get("RAY_ADDRESS"))


def needs_teacher(settings: DumpSettings) -> bool:
    """Returns whether a dump needs a teacher, or another model that answers."""
    return settings.data.responses != "dataset" or any(family != "images" for family in settings.cache.families)


def is_sealed(cache_path: str) -> bool:
    """Returns whether the path holds a sealed cache, so that a dump may have nothing to do."""
    folder = open_folder(cache_path)
    return has_cache(folder) and Cache.open(cache_path, families=()).sealed


def _num_ranks(settings: Mapping[str, Any]) -> int:
    return int(settings.get("tensor_parallel_size", 1)) * int(settings.get("pipeline_parallel_size", 1))


def _check_home() -> Iterator[str]:
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigError("HOME is not set, and Ray and vLLM keep files there; set it to a folder of yours") from error
    try:
        check_writable(home, field="HOME")
    except ConfigError as error:
        has_token = (home / _RAY_TOKEN).is_file() or os.environ.get("RAY_AUTH_MODE") == "disabled"
        if has_token or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
            yield f"{error}; vLLM and transformers keep caches there and will do without"
        else:
            raise ConfigError(f"{error} (Ray, vLLM and transformers keep settings and caches there)") from error


def _check_files() -> Iterator[str]:
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= _MANY_FILES:
        return
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    advice = f"`ulimit -n {most}` first" if most > limit else "raise the hard limit (docker: --ulimit nofile=65536)"
    if limit < _FEW_FILES:
        raise ConfigError(f"a process may open {limit} files here, and Ray needs {_FEW_FILES} at least: {advice}")
    yield f"a process may open {limit} files here; Ray may want more in a large run: {advice}"


def _check_temporary(*, is_local: bool) -> Iterator[str]:
    try:
        general = tempfile.gettempdir()
    except FileNotFoundError as error:  # none of its candidates can be written
        raise ConfigError(f"there is no folder for temporary files: {error.strerror}; set TMPDIR to one") from error
    ray_folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray chooses
    for name, folder in {"TMPDIR": general, **({"RAY_TMPDIR": ray_folder} if is_local else {})}.items():
        check_writable(folder, field=f"the folder for temporary files ({name})")
    length = len(os.fsencode(str(Path(ray_folder).absolute()) + _RAY_SOCKET))
    if is_local and length > _SOCKET_PATH_BYTES:
        raise ConfigError(
            f"Ray's temporary folder is {ray_folder}: the paths of its sockets would have {length} bytes, and "
            f"{_SOCKET_PATH_BYTES} are allowed; set RAY_TMPDIR to a shorter path, such as /tmp"
        )
    free = measure_free_bytes(ray_folder)
    if free is not None and free < _TEMPORARY_BYTES:
        yield (
            f"{ray_folder} has {format_bytes(free)} free; Ray's logs, and objects that memory does not hold, go there: "
            f"free {format_bytes(_TEMPORARY_BYTES)}, or set RAY_TMPDIR"
        )


def _check_shared_memory(*, runs_vllm: bool) -> Iterator[str]:
    if sys.platform != "linux":
        return
    advice = "mount a tmpfs there (docker: --shm-size=1g)"
    try:
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY):
            pass
    except OSError as error:
        message = f"{_SHARED_MEMORY}, the machine's shared memory, cannot be used: {error.strerror}; {advice}"
        if runs_vllm:
            raise ConfigError(f"{message}; vLLM does not start without it") from error
        yield f"{message}; Ray and data loaders will be slower without it"
        return
    free = measure_free_bytes(_SHARED_MEMORY)
    if free is not None and free < _SHARED_BYTES:
        yield f"{_SHARED_MEMORY} has {format_bytes(free)} free; Ray keeps objects there, or in /tmp, slower: {advice}"
