"""Workers, nodes and drivers of a three-node cluster get SIGTERM or are killed; nothing is lost or changed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.reader.cache import Cache
from storage.verify.scan_cache import verify
from tests.teacher_dump.conftest import WriteConfig
from tests.teacher_dump.ray_jobs.test_part_pool import commits, dump_here, start_dump, wait_until
from tests.teacher_dump.ray_nodes import RayNodes, children, ray_nodes
from tests.tiny import make_tiny_dataset

NUM_KILLS = 50
VICTIMS = {"worker": 0.7, "node": 0.18, "driver": 0.12}  # how often each is chosen
PATIENCE_S = 120.0  # for a part to be committed between two kills; then the next comes anyway
LIMIT_S = 2400.0  # it took 16 minutes beside a load of twenty


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2) as cluster:
        yield cluster


@pytest.mark.slow
def test_sigterm_to_a_worker_and_to_a_node_costs_nothing(
    nodes: RayNodes, write_config: WriteConfig, tmp_path: Path
) -> None:
    """As spot nodes go: the only teacher ends, then its successor's whole node; the dump goes on with a third one."""
    file = make_tiny_dataset(tmp_path / "data", num_samples=480, num_images=240, turns=2)["train"]
    config = write_config(data={"sources": [{"path": str(file)}]})
    cache, logs = tmp_path / "cache", tmp_path / "runs/tiny/logs"
    dump = start_dump(config, environment=nodes.environment)

    def teacher_after(num_parts: int) -> int:
        """Returns the process of the teacher that runs when so many parts are committed."""
        wait_until(lambda: len(commits(cache)) >= num_parts, dump)
        newest = max(logs.glob("teacher-*"), key=lambda path: path.stat().st_ctime_ns)
        return int(newest.stem.rsplit("-", 1)[1])

    worker = teacher_after(3)
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: worker not in nodes.workers(), dump)
    second = teacher_after(len(commits(cache)) + 3)
    (raylet,) = [node for node in nodes.raylets() if second in children(node, "ray::")]
    os.kill(raylet, signal.SIGTERM)
    wait_until(lambda: raylet not in nodes.raylets() and not Path(f"/proc/{second}").exists(), dump)
    assert len(commits(cache)) < 120
    said, complained = dump.communicate(timeout=1200)
    nodes.add()
    assert dump.returncode == 0, complained
    assert "Traceback" not in said + complained
    assert len(set(logs.glob("teacher-*"))) >= 3  # one after another
    dump_here(config, tmp_path / "undisturbed")
    assert commits(cache) == commits(tmp_path / "undisturbed")
    assert verify(cache).problems == []


class Kills:
    """Kills one process after another while it keeps a dump running."""

    def __init__(self, nodes: RayNodes, config: Path, caches: Path, seed: int) -> None:
        self.nodes = nodes
        self.config = config
        self.folder = caches
        self.finished: list[Path] = []
        self.killed: list[str] = []
        self.random = random.Random(seed)
        self.driver = self._start()

    @property
    def cache(self) -> Path:
        return self.folder / f"cache-{len(self.finished)}"

    def num_commits(self) -> int:
        return len(list((self.cache / "commits").glob("part-*.json")))

    def wait_for_a_part(self) -> None:
        """Until a part is committed, and a moment of chance. A dump that ends meanwhile makes room for the next."""
        before, deadline = self.num_commits(), time.monotonic() + PATIENCE_S
        while self.num_commits() == before and time.monotonic() < deadline and not self.take_result():
            time.sleep(0.05)
        time.sleep(self.random.uniform(0, 1))

    def take_result(self) -> bool:
        """Whether the dump has ended; if so, it was a success, and another one begins."""
        if self.driver.poll() is None:
            return False
        said, complained = self.driver.communicate()
        assert self.driver.returncode == 0, complained
        assert "Traceback" not in complained
        assert "cache" in said
        self.finished.append(self.cache)
        self.driver = self._start()
        return True

    def kill(self) -> None:
        (victim,) = self.random.choices(list(VICTIMS), list(VICTIMS.values()))
        if victim == "worker" and (workers := self.nodes.workers()):
            os.kill(self.random.choice(workers), signal.SIGKILL)
        elif victim == "node":
            os.kill(self.random.choice(self.nodes.raylets()), signal.SIGKILL)
            self.nodes.add()
        elif victim == "driver" and self.driver.poll() is None:
            self.driver.kill()
            self.driver.communicate()
            self.driver = self._start()
        else:
            return
        self.killed.append(victim)

    def _start(self) -> subprocess.Popen[str]:
        return start_dump(self.config, f"cache.path={self.cache}", environment=self.nodes.environment)


@pytest.mark.slow
def test_fifty_kills_change_nothing(nodes: RayNodes, write_config: WriteConfig, tmp_path: Path) -> None:
    file = make_tiny_dataset(tmp_path / "data", num_samples=1600, num_images=800, turns=2)["train"]
    (tmp_path / "data/images/train-005.png").write_bytes(b"no image")
    config = write_config(data={"sources": [{"path": str(file)}]}, dump={"actors": {"min": 1, "max": 2}})
    dump_here(config, tmp_path / "undisturbed")
    expected = commits(tmp_path / "undisturbed")

    kills = Kills(nodes, config, tmp_path, seed=int(os.environ.get("SEED", "0")))
    begun = time.monotonic()
    while len(kills.killed) < NUM_KILLS:
        assert time.monotonic() - begun < LIMIT_S, kills.killed
        kills.wait_for_a_part()
        kills.kill()
    assert set(kills.killed) == set(VICTIMS)
    while not kills.take_result():
        time.sleep(0.2)
    kills.driver.kill()
    kills.driver.communicate()

    for cache in kills.finished:
        assert commits(cache) == expected
        assert verify(cache).problems == []
        opened = Cache.open(cache)
        assert len(set(opened.sample_ids)) == opened.num_samples == 1598
        assert [error.sample_id for error in opened.errors] == ["train-0005", "train-0805"]
