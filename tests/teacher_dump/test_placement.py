from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from teacher_dump.ray_jobs.cluster import gpus_of_engine

REPOSITORY = Path(__file__).parents[2]


def test_an_engine_gets_the_gpus_of_its_ranks() -> None:
    """In one node the actor has them all; with vLLM's Ray backend each rank has a bundle of the actor's group."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher_dump.placement_script"], cwd=REPOSITORY,
        env={**os.environ, "RAY_worker_niceness": "0"}, capture_output=True, text=True, timeout=240, check=False,
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
    assert gpus_of_engine({}) == 1
    assert gpus_of_engine({"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "dtype": "x"}) == 8
