"""The dump under Ray, as processes of their own: killed and resumed, submitted as a job, commands as tasks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from storage.writer.cache_writer import CacheWriter
from teacher_dump.execution.worker_setup import make_worker_settings
from teacher_dump.planning.dump_plan import plan_dump
from teacher_dump.settings import read_settings
from teacher_dump.workers.worker import Worker
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.ray_head import RayHead
from tests.tiny import make_tiny_dataset

REPOSITORY = Path(__file__).parents[3]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # else 15
PATIENCE_S = 1200  # until something that takes 10 s on an idle machine has happened


def start_dump(config: Path, *overrides: str, environment: Mapping[str, str] = ONE_THREAD) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "teacher_dump", str(config), *overrides],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[str], *, explain: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing happened {explain()}"
        time.sleep(0.01)


def commits(cache: Path) -> dict[str, Any]:
    """Returns the content of each commit: name and sha256 of its files, errors, counts."""
    found = {}
    for path in sorted((cache / "commits").glob("part-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = {name: document[name] for name in ("families", "errors", "num_samples", "num_rows")}
    return found


def teacher_processes(run: Path) -> set[int]:
    """Returns the actors that have started, by the names of their log files."""
    return {int(log.stem.rsplit("-", 1)[1]) for log in (run / "runs/tiny/logs").glob("teacher-*")}


def dump_here(config: Path, cache: Path, *overrides: str) -> int:
    """Runs an undisturbed dump without Ray; returns how many positions the teacher scored."""
    settings = read_settings(config, [f"cache.path={cache}", *overrides])
    planned = plan_dump(settings)
    worker = Worker(make_worker_settings(planned, settings))
    num_tokens = sum(worker.run(part).num_tokens for part in planned.plan.parts)
    CacheWriter.open(cache, planned.identity, settings.cache.families).seal()
    return num_tokens


@pytest.mark.ci
@pytest.mark.slow
def test_a_dump_resumes_after_a_sigterm_a_killed_worker_and_a_killed_driver(
    ray_head: RayHead, write_config: WriteConfig, tmp_path: Path
) -> None:
    """The short form of the next two tests: each kind of end once, and the records of an undisturbed dump."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=480, num_images=240)["train"]
    (tmp_path / "data/images/train-005.png").write_bytes(b"no image")
    config = write_config(data={"sources": [{"path": str(file)}]})
    cache = tmp_path / "cache"

    def wait_for_parts(dump: subprocess.Popen[str], num_more: int) -> None:
        before = len(commits(cache))
        wait_until(lambda: len(commits(cache)) >= before + num_more, dump)

    dump = start_dump(config, environment=ray_head.environment)
    wait_for_parts(dump, 3)
    dump.send_signal(signal.SIGTERM)
    assert_stopped_well(dump, cache)

    known = teacher_processes(tmp_path)
    dump = start_dump(config, environment=ray_head.environment)
    wait_for_parts(dump, 1)
    (worker,) = teacher_processes(tmp_path) - known
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(teacher_processes(tmp_path) - known) == 2, dump)
    wait_for_parts(dump, 1)
    dump.kill()
    dump.communicate()
    assert not (cache / "manifest.json").exists()

    dump = start_dump(config, environment=ray_head.environment)
    said, complained = dump.communicate(timeout=PATIENCE_S)
    assert dump.returncode == 0, complained
    assert "Traceback" not in complained
    assert "errors       2" in said
    dump_here(config, tmp_path / "undisturbed")
    assert commits(cache) == commits(tmp_path / "undisturbed")
    opened = Cache.open(cache)
    assert len(set(opened.sample_ids)) == opened.num_samples == 478
    assert verify(cache).problems == []


def assert_stopped_well(dump: subprocess.Popen[str], cache: Path) -> None:
    """Asserts that a dump that got SIGTERM ends between two parts and loses none in flight."""
    _, complained = dump.communicate(timeout=PATIENCE_S)  # within 30 s, where the processor is not shared with others
    assert dump.returncode == 128 + signal.SIGTERM, complained
    assert "stopped by SIGTERM: " in complained
    assert "run the same command again to resume" in complained
    assert "Traceback" not in complained
    assert not (cache / "manifest.json").exists()
    files = {path.name for path in (cache / "response").iterdir()}
    named = {document["families"]["response"]["file"].rpartition("/")[2] for document in commits(cache).values()}
    assert files == named  # nothing that was in flight is lost
    summary = json.loads((cache / "dump.json").read_text(encoding="utf-8"))
    assert summary["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_a_killed_dump_resumes(write_config: WriteConfig, tmp_path: Path) -> None:
    """The driver is killed, then a worker of the second run; the records are those of an undisturbed dump."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=480, num_images=240, turns=2)["train"]
    (tmp_path / "data/images/train-005.png").write_bytes(b"no image")
    config = write_config(data={"sources": [{"path": str(file)}]})
    cache, logs = tmp_path / "cache", tmp_path / "runs/tiny/logs"

    first = start_dump(config)
    wait_until(lambda: len(commits(cache)) >= 3, first)
    first.kill()
    first.communicate()
    time.sleep(1)  # the orphaned actor notices
    survived = len(commits(cache))
    assert 3 <= survived < 120
    assert not (cache / "manifest.json").exists()

    known = set(logs.glob("teacher-*"))
    second = start_dump(config)
    wait_until(lambda: len(commits(cache)) >= survived + 3, second)
    (log,) = set(logs.glob("teacher-*")) - known
    os.kill(int(log.stem.rsplit("-", 1)[1]), signal.SIGKILL)
    said, complained = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, complained
    assert "Traceback" not in complained
    assert "errors       2" in said
    assert len(set(logs.glob("teacher-*")) - known) == 2

    dump_here(config, tmp_path / "undisturbed")
    assert commits(cache) == commits(tmp_path / "undisturbed")
    opened = Cache.open(cache)
    assert len(set(opened.sample_ids)) == opened.num_samples == 478
    assert verify(cache).problems == []
    third = start_dump(config)
    assert "nothing; the cache was complete" in third.communicate(timeout=PATIENCE_S)[0]


@pytest.mark.slow
def test_sigterm_ends_a_dump_between_two_parts(write_config: WriteConfig, tmp_path: Path) -> None:
    """As a spot node's: parts in flight are committed, the message says how to resume, and resuming works."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=480, num_images=240)["train"]
    config = write_config(data={"sources": [{"path": str(file)}]})
    cache = tmp_path / "cache"
    dump = start_dump(config)
    wait_until(lambda: len(commits(cache)) >= 2, dump)
    dump.send_signal(signal.SIGTERM)
    assert_stopped_well(dump, cache)
    summary = json.loads((cache / "dump.json").read_text(encoding="utf-8"))
    assert summary["num_parts_written"] == len(commits(cache))
    dump_here(config, tmp_path / "undisturbed")
    went_on = start_dump(config)
    _, complained = went_on.communicate(timeout=PATIENCE_S)
    assert went_on.returncode == 0, complained
    assert commits(cache) == commits(tmp_path / "undisturbed")


def test_ray_job_submit_runs_the_dump(ray_head: RayHead, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(dump={"samples_per_part": 12, "actors": 2})
    submitted = subprocess.run(
        ["ray", "job", "submit", "--address", ray_head.dashboard, "--working-dir", ".", "--",
         "python", "-m", "teacher_dump", str(config)],
        cwd=REPOSITORY, env=ray_head.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    assert "written now  2 parts" in submitted.stdout
    assert Cache.open(tmp_path / "cache").num_samples == 24
    assert verify(tmp_path / "cache").problems == []
    assert list((tmp_path / "runs/tiny/logs").glob("teacher-*"))


@pytest.mark.ci
@pytest.mark.slow
def test_two_jobs_share_a_growing_pool_and_show_metrics(
    ray_head: RayHead, write_config: WriteConfig, tmp_path: Path
) -> None:
    """A job that is submitted twice scores hardly more than once; Ray's endpoint shows how far it is.

    The first job's only actor is halted until its pool has grown, so that it must grow however fast the machine is;
    but not before it has written a part: Ray waits for an actor that is halted while it is made, and starts no other.
    """
    file = make_tiny_dataset(tmp_path / "data", num_samples=960, num_images=480, turns=2)["train"]
    config = write_config(data={"sources": [{"path": str(file)}]}, dump={"actors": {"min": 1, "max": 2}})
    first = start_dump(config, environment=ray_head.environment)
    wait_until(lambda: len(commits(tmp_path / "cache")) > 0, first)
    halted, *others = teacher_processes(tmp_path)
    os.kill(halted, signal.SIGSTOP)
    try:
        wait_until(lambda: bool(others) or len(teacher_processes(tmp_path)) == 2, first)
    finally:
        os.kill(halted, signal.SIGCONT)
    second = start_dump(config, environment=ray_head.environment)
    scraped = ""

    def shows_parts() -> bool:
        nonlocal scraped
        with urllib.request.urlopen(ray_head.metrics, timeout=10) as answer:
            scraped = answer.read().decode()
        return bool(re.search(r'^ray_stillhouse_dump_parts\{.*run="tiny".*\} [1-9]', scraped, re.MULTILINE))

    wait_until(shows_parts, first)
    for name in ("samples", "tokens", "tokens_per_second", "bytes", "errors", "seconds_left", "parts_planned"):
        assert f"ray_stillhouse_dump_{name}{{" in scraped
    said = [job.communicate(timeout=PATIENCE_S) for job in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert verify(tmp_path / "cache").problems == []
    assert Cache.open(tmp_path / "cache").num_samples == 960
    num_tokens = [int(n.replace(",", "")) for out, _ in said for n in re.findall(r"teacher +([\d,]+) tokens", out)]
    once = dump_here(config, tmp_path / "undisturbed")
    assert once <= sum(num_tokens) <= 1.5 * once  # both may have had the same parts in flight
    assert commits(tmp_path / "cache") == commits(tmp_path / "undisturbed")


@pytest.mark.ci
@pytest.mark.slow
def test_a_blind_teacher_fails_in_one_message_and_writes_nothing(
    ray_head: RayHead, write_config: WriteConfig, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "blind")
    tensors = load_file(tmp_path / "blind/model.safetensors")
    zeroed = {name: t.zero_() if "multi_modal_projector" in name else t for name, t in tensors.items()}
    save_file(zeroed, tmp_path / "blind/model.safetensors", metadata={"format": "pt"})
    config = write_config(teacher={"model": str(tmp_path / "blind")}, dump={"actors": 8})
    dump = start_dump(config, environment=ray_head.environment)
    _, complained = dump.communicate(timeout=PATIENCE_S)
    assert dump.returncode == 1
    assert "error: the teacher is blind" in complained
    assert "Ray has 3 CPUs and the 8 actors want 8" in complained
    assert "Traceback" not in complained
    assert commits(tmp_path / "cache") == {}


def test_commands_run_as_tasks_and_leave_their_output(ray_head: RayHead, tmp_path: Path) -> None:
    code = (
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from teacher_dump.ray_jobs import Command, run_commands\n"
        "folder = Path(sys.argv[1])\n"
        "script = 'import os, sys; print(os.environ[\"GREETING\"], os.getcwd()); sys.exit(int(sys.argv[1]))'\n"
        "commands = [Command(f'c{n}', (sys.executable, '-c', script, str(n)), folder / f'{n}.log',\n"
        "                    {'GREETING': f'hello {n}'}) for n in range(3)]\n"
        "commands += [Command('gone', ('/no/such/program',), folder / 'gone.log')]\n"
        "assert list(run_commands([], 1, 0)) == []\n"
        "print(json.dumps({r.name: [r.returncode, r.seconds] for r in run_commands(commands, 1, 0)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY, env=ray_head.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert {name: code for name, (code, _) in results.items()} == {"c0": 0, "c1": 1, "c2": 2, "gone": 127}
    assert all(0 < seconds < PATIENCE_S for _, seconds in results.values())
    for number in range(3):
        said = (tmp_path / f"{number}.log").read_text(encoding="utf-8")
        assert said == f"hello {number} {REPOSITORY}\n"


def test_sigterm_is_heard_after_ray_is_left(ray_head: RayHead) -> None:
    """Ray's core takes the handler away when it ends: a training after a dump would die of the signal."""
    code = (
        "import os, signal, sys, time\n"
        "from storage.processes.stop_signals import get_exit_code, interruptible, exit_now\n"
        "from teacher_dump.ray_jobs.cluster import connect_to_ray\n"
        "try:\n"
        "    with interruptible():\n"
        "        with connect_to_ray(None, local_cpus=1):\n"
        "            pass\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt as stop:\n"
        "    exit_now(get_exit_code(stop))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=ray_head.environment, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 143


@pytest.mark.ci
@pytest.mark.slow
def test_a_function_is_called_with_a_loaded_teacher(
    ray_head: RayHead, write_config: WriteConfig, tmp_path: Path
) -> None:
    """Its result comes back, its failure is a StillhouseError, and what it prints is in the logs."""
    code = (
        "import json, sys\n"
        "from storage.errors import StillhouseError\n"
        "from teacher_dump.execution.worker_setup import call_with_teacher\n"
        "from teacher_dump.planning.dump_plan import plan_dump\n"
        "from teacher_dump.settings import read_settings\n"
        "from tests.teacher_dump.teacher_calls import count_tokens, fail\n"
        "settings = read_settings(sys.argv[1])\n"
        "planned = plan_dump(settings)\n"
        "print(json.dumps(call_with_teacher(planned, settings, count_tokens, list(planned.plan.parts))))\n"
        "try:\n"
        "    call_with_teacher(planned, settings, fail, 'by a division')\n"
        "except StillhouseError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_config())],
        cwd=REPOSITORY, env=ray_head.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted, failed = done.stdout.splitlines()
    assert len(json.loads(counted)) == 8
    assert all(num_tokens > 4 * 16 for num_tokens in json.loads(counted))  # an image is 16 positions
    assert failed.startswith("a dump worker failed: ZeroDivisionError: by a division; the traceback is in ")
    said = "".join(log.read_text(encoding="utf-8") for log in (tmp_path / "runs/tiny/logs").glob("teacher-*"))
    assert "counted 8 parts" in said
    assert "Traceback" in said
