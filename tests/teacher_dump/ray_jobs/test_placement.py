from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import StillhouseError
from teacher_dump.ray_jobs.cluster import check_head_answers, count_engine_gpus

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.ci
@pytest.mark.slow
def test_an_engine_gets_the_gpus_of_its_ranks() -> None:
    """In one node the actor has them all; with vLLM's Ray backend each rank has a bundle of the actor's group."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher_dump.placement_script"], cwd=REPOSITORY,
        env={**os.environ, "RAY_worker_niceness": "0"}, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_one_node, in_a_group = json.loads(done.stdout.splitlines()[-1])
    assert len(in_one_node["gpus"].split(",")) == 2
    assert in_one_node["bundles"] is None
    assert in_a_group["bundles"] == [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    head, first, second = in_a_group["gpus"], *in_a_group["ranks"]
    assert head == first  # the output head shares the first rank's GPU
    assert first != second


def test_ranks_are_counted_over_both_ways_of_splitting() -> None:
    assert count_engine_gpus({}) == 1
    assert count_engine_gpus({"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "dtype": "x"}) == 8


@pytest.mark.ci
@pytest.mark.slow
def test_a_run_of_several_processes_has_a_gpu_for_each_of_them(tmp_path: Path) -> None:
    """What torchrun's ranks would see, in a Ray that believes in four GPUs; and what waits without end says so."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher_dump.devices_script", str(tmp_path)], cwd=REPOSITORY,
        env={**os.environ, "RAY_worker_niceness": "0"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [len(said[name].split(",")) for name in ("one", "two", "three")] == [1, 2, 3]
    assert said["lacking"] == "5 GPUs, where a node has 4 at most"
    assert (
        said["waiting"] == "Ray to find room for 1 commands, each of which asks for 5 GPUs, where a node has 4 at most"
    )


def test_a_ray_that_never_answers_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(StillhouseError, match=rf"cannot connect to Ray at {address}: no answer within 0.5 s"):
            check_head_answers(address, limit_s=0.5)
    for left_to_ray in ("auto", "ray://example.invalid:10001", "local"):
        check_head_answers(left_to_ray, limit_s=0.5)
