"""Missing resources for Ray and vLLM are one message before any work. Each case is a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from storage.config import CacheSection
from storage.errors import ConfigError
from teacher_dump.config import DataSection, DumpSection, TeacherSection
from teacher_dump.execution.machine import check_dump_machine, check_gpu_count, check_machine, needs_teacher
from teacher_dump.settings import DumpSettings

REPOSITORY = Path(__file__).parents[3]
LOOK = """
import sys
from storage.errors import ConfigError
from teacher_dump.execution.machine import check_machine
try:
    print("\\n".join(check_machine(runs_vllm=True, ray_address=None)))
except ConfigError as error:
    sys.exit(str(error))
"""


def check_in_process(prefix: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs check_machine in a process with mounts of its own."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", LOOK], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def find_problem() -> str:
    """Returns the message with which check_machine refuses; empty if it does not."""
    try:
        check_machine(runs_vllm=True, ray_address=None)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "HOME is /proc/nobody: it cannot be written" in find_problem()
    assert "(Ray, vLLM and transformers keep settings and caches there)" in find_problem()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # which Ray would have kept there
    warnings = check_machine(runs_vllm=True, ray_address=None)
    assert any("HOME is /proc/nobody" in each for each in warnings)


def test_a_home_that_can_be_made_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))  # which Ray makes
    assert find_problem() == ""


def test_a_path_that_is_too_long_for_a_socket_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        with monkeypatch.context() as environment:
            environment.setenv(variable, str(folder))
            assert f"Ray's temporary folder is {folder}: the paths of its sockets would have" in find_problem()
            assert "set RAY_TMPDIR to a shorter path" in find_problem()
    monkeypatch.setenv("TMPDIR", str(folder))
    with monkeypatch.context() as environment:
        environment.setenv("RAY_ADDRESS", "there:6379")  # and the sockets are there
        assert find_problem() == ""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert find_problem() == ""


def test_a_folder_for_temporary_files_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    assert "the folder for temporary files (RAY_TMPDIR) is /proc/nowhere: it cannot be written" in find_problem()


def test_few_file_descriptors_are_named() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert "a process may open 200 files here, and Ray needs 256 at least: `ulimit -n" in find_problem()
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        warnings = check_machine(runs_vllm=True, ray_address=None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert any(
        "a process may open 1024 files here; Ray may want more in a large run: `ulimit" in each for each in warnings
    )


def test_shared_memory_that_cannot_be_used_is_named() -> None:
    script = 'umount -l /dev/shm && mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    mounts = ("unshare", "--mount", "sh", "-c", script, "sh")
    try:
        possible = subprocess.run([*mounts, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("this user may not mount")
    done = check_in_process(mounts)
    assert done.returncode == 1
    assert "/dev/shm, the machine's shared memory, cannot be used: Read-only file system; mount a tmpfs" in done.stderr
    assert "vLLM does not start without it" in done.stderr
    script = script.replace("-o ro", "-o size=1m")
    done = check_in_process(("unshare", "--mount", "sh", "-c", script, "sh"))
    assert done.returncode == 0
    assert "/dev/shm has 1.0 MB free; Ray keeps objects there" in done.stdout


def settings(run: Path, **dump: object) -> DumpSettings:
    return DumpSettings(
        run,
        DataSection(),
        TeacherSection(model="teacher", settings={"tensor_parallel_size": 2}),
        DumpSection.model_validate(dump),
        CacheSection(path=str(run / "cache")),
    )


def test_gpus_that_no_machine_has_are_refused_and_a_cluster_is_trusted(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"dump\.gpus_per_actor asks for 1000 GPUs and this machine has \d+: the work"
    ):
        check_dump_machine(settings(tmp_path, gpus_per_actor=1000))
    check_dump_machine(settings(tmp_path, gpus_per_actor=1000, ray_address="cluster:6379"))
    check_gpu_count(0, 0, field="x")
    tokens_only = replace(settings(tmp_path, gpus_per_actor=1000), cache=CacheSection(families=()))
    assert not needs_teacher(tokens_only)
    assert check_dump_machine(tokens_only) == []


def test_this_machine_passes_the_checks() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    warnings = check_machine(runs_vllm=True, ray_address=None)
    assert any("files" in line for line in warnings) == (soft < 4096)


WAITING = """
import sys
from pathlib import Path
from storage.errors import ConfigError
from teacher_dump.ray_jobs import Command, run_commands
try:
    list(run_commands([Command("a", ("true",), Path(sys.argv[1]))], 1, 1000))
except ConfigError as error:
    sys.exit(str(error))
"""


def test_work_that_a_local_ray_has_no_room_for_does_not_wait(tmp_path: Path) -> None:
    """Ray itself knows best what it found: it is asked once it is there, whoever has started it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", WAITING, str(tmp_path / "log")], cwd=REPOSITORY, env=environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ablations.gpus_per_run or dump.gpus_per_actor: a process wants 1000 GPUs and Ray has" in done.stderr
    assert "Traceback" not in done.stderr
