"""Run by test_placement in a process of its own: places an engine in a Ray that is told it has four GPUs."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from teacher_dump.ray_jobs.placement import Placement


class Engine:
    """Looks at its place from another thread, as the one that opens the teacher, and starts ranks as vLLM does."""

    def place(self) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as thread:
            group = thread.submit(get_current_placement_group).result()
        share = os.environ.get("VLLM_RAY_PER_WORKER_GPUS")
        found: dict[str, Any] = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "bundles": None, "ranks": []}
        if group is not None and share is not None:
            found["bundles"] = group.bundle_specs
            for index in range(len(group.bundle_specs)):
                where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                rank = ray.remote(num_cpus=0, num_gpus=float(share), scheduling_strategy=where)(visible)
                found["ranks"].append(ray.get(rank.remote(), timeout=600))
        return found


def visible() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def main() -> None:
    ray.init(
        address="local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False,
        object_store_memory=80 * 2**20,
    )  # fmt: skip
    kind: Any = ray.remote(Engine)
    answers = []
    for settings in ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}):
        placement = Placement.from_settings(settings, num_cpus=1, num_gpus=None)
        engine = kind.options(**placement.actor_options(), **placement.group_options()).remote()
        answers.append(ray.get(engine.place.remote(), timeout=600))
        ray.kill(engine)
        placement.remove_groups()
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
